"""What cannot be served exactly is refused at load, with every reason; so are settings that cannot work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import save_tiny_model, tiny_config
from transformers import AutoModelForCausalLM, Llama4Config, LlamaConfig, MambaConfig, PreTrainedModel, T5Config

from gralora_runtime.assemble import assemble
from gralora_runtime.config import EngineConfig
from gralora_runtime.errors import ConfigError, ModelUnsupportedError
from gralora_runtime.model.description import Description, OtherBuildError, describe
from gralora_runtime.model.loading import unsupported_features
from gralora_runtime.model.programs import choice
from gralora_runtime.model.programs.transformers import attention


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    model = save_tiny_model("llama", tmp_path_factory.mktemp("model"))
    return EngineConfig(model=model, device="cpu", num_threads=1, kv_cache_bytes=1 << 20, adapter_pool_bytes=1 << 20)


@pytest.mark.parametrize(
    ("model_config", "reason"),
    [
        (T5Config(), "encoder-decoder models are not served, got True"),
        (MambaConfig(), "no multi-head attention (num_attention_heads), got True"),
        (
            Llama4Config(),
            "multimodal models are not served, but for the language models of gemma3, got 'llama4'",
        ),
        (
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "rotary angles that depend on the batch (rope_type), got ['dynamic']",
        ),
    ],
    ids=["encoder-decoder", "state-space", "multimodal", "dynamic-rope"],
)
def test_a_model_that_cannot_be_served_exactly_is_named_with_its_reason(model_config: Any, reason: str) -> None:
    assert reason in unsupported_features(model_config)


def test_all_reasons_are_given_at_once() -> None:
    assert len(unsupported_features(T5Config(quantization_config={"quant_method": "gptq"}))) >= 2


def test_a_plain_model_has_no_reason() -> None:
    assert unsupported_features(LlamaConfig()) == []


def test_the_check_at_start_refuses_a_model_that_the_program_computes_wrongly(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model of Llama's build with some scale of its own would be, that no configuration key tells of."""

    def wrong_scale(model: PreTrainedModel) -> Description:
        description = describe(model)
        return replace(description, scale=description.scale * 1.1)

    monkeypatch.setattr(choice, "describe", wrong_scale)

    with pytest.raises(ModelUnsupportedError, match="paged logits differ from transformers' by"):
        assemble(config)


def test_the_check_at_start_refuses_a_model_whose_attention_is_computed_wrongly(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for the architectures that transformers' own forward pass computes."""

    def other_build(_: PreTrainedModel) -> Description:
        raise OtherBuildError("as the test wants it")

    exact = attention.paged_attention
    monkeypatch.setattr(choice, "describe", other_build)
    monkeypatch.setattr(attention, "paged_attention", lambda *args: exact(*args[:-3], 8, *args[-2:]))

    with pytest.raises(ModelUnsupportedError, match="paged logits differ from transformers' by"):
        assemble(config)


@pytest.mark.parametrize(("architecture", "window"), [("llama", 0), ("mistral", 24)])
def test_a_window_counts_where_transformers_looks_at_it(architecture: str, window: int) -> None:
    """Models that were Mistral's once still have its key; it took effect here beyond what the check at start sees."""
    config = tiny_config(architecture)
    config.sliding_window = 24

    description = describe(AutoModelForCausalLM.from_config(config))

    assert [layer.window for layer in description.layers] == [window, window]


SMALL_STEPS = {"max_num_seqs": 1, "max_num_batched_tokens": 1}
SHORT_SEQUENCES = {"max_model_len": 9, "page_size": 4}


@pytest.mark.parametrize("sizes", [SMALL_STEPS, SHORT_SEQUENCES, SMALL_STEPS | SHORT_SEQUENCES], ids=str)
def test_the_check_at_start_fits_into_what_is_served_and_still_checks(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]
) -> None:
    """Its prompt of 40 tokens once failed at start where steps or sequences were shorter."""
    small = replace(config, **sizes)
    assemble(small).adapters.close()
    monkeypatch.setattr(choice, "describe", lambda model: replace(describe(model), scale=1.0))

    with pytest.raises(ModelUnsupportedError, match="paged logits differ from transformers' by"):
        assemble(small)


@pytest.mark.parametrize("argument", ["position_bias", "attention_mask"])
def test_attention_that_asks_for_what_we_do_not_compute_is_refused_by_name(argument: str) -> None:
    """The configuration did not tell of it, the model's own call does."""
    asked: dict[str, Any] = {"attention_mask": None} | {argument: torch.ones(1)}
    query = torch.zeros(1, 1, 1, 4)

    with pytest.raises(ModelUnsupportedError, match=f"its attention uses {argument}$"):
        attention._attention_function(torch.nn.Identity(), query, query, query, **asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": Path("/nowhere")}, "is not a Hugging Face model directory"),
        ({"dtype": "bfloat16"}, "dtype must be float32 on the CPU"),
        ({"max_model_len": 4096}, "the model ends at 512 positions"),
        ({"kv_cache_bytes": 1000}, "too few to serve with"),
        ({"kv_cache_bytes": 20_000, "max_model_len": 400}, "a sequence of max_model_len=400 tokens needs"),
        ({"num_threads": 4096}, "num_threads: "),
    ],
    ids=["no-model", "dtype", "too-long", "no-pages", "too-few-pages", "threads"],
)
def test_impossible_settings_are_named(config: EngineConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assemble(replace(config, **changes))
    assert torch.get_num_threads() == 1, "a refused number of threads stayed behind"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "abacus"}, "device must be one of auto, cpu, cuda, got 'abacus'"),
        ({"kernel_backend": "cuda"}, "kernel_backend must be one of"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "decoding rows would not fit into a step"),
        ({"kv_cache_bytes": -1}, "kv_cache_bytes must be at least 1, got -1"),
        ({"cuda_graphs": (1, 64)}, r"cuda_graphs must be numbers of rows from 1 to max_num_seqs \(32\), got 1, 64"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**{"model": Path("m")} | changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_explicit_device_or_backend_that_is_not_there_is_an_error_never_a_fallback(config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        assemble(replace(config, device="cuda"))
    with pytest.raises(ConfigError, match="kernel_backend: "):
        assemble(replace(config, kernel_backend="triton"))
