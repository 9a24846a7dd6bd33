"""Whatever a model fails with while it is read and checked at start is one sentence; where, is told to developers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import VOCAB_SIZE, save_tiny_model, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Llama4TextConfig,
    MambaConfig,
    MiniCPM3Config,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3NextConfig,
)

from gralora_runtime import assemble as assembling
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig
from gralora_runtime.errors import ConfigError, ModelUnsupportedError
from gralora_server.cli.app import run
from gralora_server.cli.output import ExitCode

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
FALCON = SIZES | {"num_kv_heads": 2}
COMPUTE_THEMSELVES = "its layers compute attention by themselves, which lets nobody else do it"
NO_ATTENTION = (
    "layers of unknown attention types (layer_types), got ['linear_attention']; no multi-head attention "
    "(num_attention_heads), got True; no number of positions (max_position_embeddings), got True"
)
# What the refusal ends with.
OTHERS: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "deepseek": (
        lambda: DeepseekV3Config(**SIZES, **LATENT, **EXPERTS),
        "keys and values are compressed (kv_lora_rank), got 16",
    ),
    "minicpm3": (lambda: MiniCPM3Config(**SIZES, **LATENT), "keys and values are compressed (kv_lora_rank), got 16"),
    "llama4": (
        lambda: Llama4TextConfig(**SIZES, num_key_value_heads=2, head_dim=16, num_local_experts=4),
        "layers of unknown attention types (layer_types), got ['chunked_attention']",
    ),
    "qwen3-next": (
        lambda: Qwen3NextConfig(**SIZES, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2),
        "layers of unknown attention types (layer_types), got ['linear_attention']",
    ),
    "mamba": (
        lambda: MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=VOCAB_SIZE),
        NO_ATTENTION,
    ),
    "falcon": (lambda: FalconConfig(**FALCON), COMPUTE_THEMSELVES),
    "falcon-new": (lambda: FalconConfig(**FALCON, new_decoder_architecture=True), COMPUTE_THEMSELVES),
    "falcon-rw": (
        lambda: FalconConfig(**FALCON, alibi=True, multi_query=False, parallel_attn=False),
        "positions are told by biases of scores (alibi), got True",
    ),
    "bloom": (
        lambda: BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCAB_SIZE),
        "no number of positions (max_position_embeddings), got True",
    ),
    # Whose layers see their window in their mask alone; beyond the prompt of the check, too.
    "qwen2-moe with windows": (
        lambda: Qwen2MoeConfig(
            **SIZES, num_key_value_heads=2, num_experts=4, use_sliding_window=True, sliding_window=256
        ),
        "its attention is not told of its window (sliding_window)",
    ),
    "bert": (lambda: BertConfig(**SIZES), "its attention is not causal (is_causal)"),
}


def save_other(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(OTHERS[name][0]()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(model=tmp_path, device="cpu", num_threads=1, kv_cache_bytes=1 << 20, adapter_pool_bytes=1 << 20)


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_fails_when_it_is_checked_is_refused_in_a_sentence(name: str, config: EngineConfig) -> None:
    save_other(name, config.model)

    with pytest.raises(ModelUnsupportedError) as caught:
        asyncio.run(AsyncEngine.start(config))
    assert str(caught.value).endswith(OTHERS[name][1])
    assert "\n" not in str(caught.value)


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


STEPS = {"expected_logits": "computed", "make_runner": "set up", "check_runner": "computed in steps"}


@pytest.mark.parametrize("step", STEPS)
def test_where_it_failed_is_told_to_developers_only(
    step: str, config: EngineConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_model("llama", config.model)
    monkeypatch.setattr(assembling, step, failing(KeyError("first line\nsecond line")))
    caplog.set_level(logging.DEBUG, "gralora_runtime")

    with pytest.raises(ModelUnsupportedError, match=rf"LlamaForCausalLM cannot be {STEPS[step]} \(KeyError: "):
        assembling.assemble(config)

    (told,) = [record for record in caplog.records if record.exc_info]
    assert told.levelno == logging.DEBUG


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=repr)
def test_a_model_that_wants_more_memory_than_there_is_is_not_called_unsupported(
    error: Exception, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("llama", config.model)
    monkeypatch.setattr(assembling, "make_runner", failing(error))

    with pytest.raises(ConfigError, match=r"cannot be set up: there is not enough memory \("):
        assembling.assemble(config)


def test_torchs_word_for_a_lack_of_host_memory_is_understood(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("llama", config.model)
    monkeypatch.setattr(assembling, "make_runner", lambda _: torch.empty(1 << 55))

    with pytest.raises(ConfigError, match="there is not enough memory"):
        assembling.assemble(config)


def test_files_that_are_damaged_are_named(config: EngineConfig) -> None:
    save_tiny_model("llama", config.model)
    (config.model / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelUnsupportedError, match="LlamaForCausalLM cannot be read"):
        assembling.assemble(config)

    save_tiny_model("llama", config.model)
    weights = load_file(config.model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, config.model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelUnsupportedError, match=r"its files lack 1 of its 21 weights, such as model\.layers\.1\.mlp"
    ):
        assembling.assemble(config)

    (config.model / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=f"the model {config.model} cannot be read"):
        assembling.assemble(config)


def test_the_command_ends_as_for_other_settings_that_cannot_work(
    config: EngineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    save_other("falcon", config.model)

    code = run(["serve", "--model", str(config.model), "--address", "127.0.0.1:0", "--threads", "1"])

    said = capsys.readouterr().err
    assert code == ExitCode.USAGE
    assert "error: model 'FalconForCausalLM' cannot be served exactly" in said.splitlines()[-1]
    assert "Traceback" not in said
