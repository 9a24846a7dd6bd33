"""`gralora adapters merge`: the weights that PEFT's own merge gives, in a directory that transformers loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.checkpoints import write_gralora
from support.larger import FROM_NEW, larger_configs, peft_logits, peft_model, save_larger
from support.peft_adapters import gralora_config, in_authors_dialect, lora_config, save_adapter
from support.served import replacing_configs
from support.tiny_models import CHAT_TEMPLATE, save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.adapters.checkpoint.spec import LayerKind, ModuleShape
from gralora_runtime.errors import AdapterRejectedError
from gralora_runtime.model.merging import merge_adapter
from gralora_runtime.model.module_shapes import module_shapes
from gralora_server.cli.app import run
from gralora_server.cli.output import ExitCode

TOLERANCE = 1e-6  # largest difference of a weight in float32


def merge(adapter: Path, model: Path, out: Path, *options: str) -> int:
    return run(["adapters", "merge", str(adapter), "--model", str(model), "--out", str(out), *options])


def peft_merged(model: Path, adapter: Path) -> PreTrainedModel:
    base = AutoModelForCausalLM.from_pretrained(model)
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def config_of(kind: str, architecture: str) -> Any:
    return {
        "lora": lambda: lora_config(architecture, 4),
        "rslora": lambda: lora_config(architecture, 4, use_rslora=True, alpha=3),
        "gralora": lambda: gralora_config(architecture, 8, 4),
        "hybrid": lambda: gralora_config(architecture, 8, 2, hybrid_r=3, alpha=7),
        "authors": lambda: gralora_config(architecture, 8, 2, hybrid_r=3, alpha=7),
        "dora": lambda: lora_config(architecture, 4, use_dora=True),
        "biases": lambda: lora_config(architecture, 4, use_dora=True, bias="lora_only"),
    }[kind]()


KINDS = ("lora", "rslora", "gralora", "hybrid", "authors", "dora")


def is_target(shape: ModuleShape) -> bool:
    return shape.kind is LayerKind.LINEAR


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*((a, kind) for a in ("llama", "gpt2", "phi3") for kind in KINDS), ("gpt2", "biases"), ("qwen2", "biases")],
)
def test_merged_weights_are_those_of_peft(architecture: str, kind: str, tmp_path: Path) -> None:
    model = save_tiny_model(architecture, tmp_path / "model")
    adapter = save_adapter(tiny_model(architecture), config_of(kind, architecture), tmp_path / "adapter")
    expected = peft_merged(model, adapter).state_dict()
    if kind == "authors":  # which PEFT would read as its own; the mathematics stay the same
        in_authors_dialect(adapter)

    assert merge(adapter, model, tmp_path / "out") == ExitCode.OK
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    changed = {name for name, weight in merged.items() if not torch.equal(weight, before[name])}

    biases = {
        f"{shape.name}.bias"
        for shape in module_shapes(model)
        if shape.has_bias and is_target(shape) and kind == "biases"
    }
    assert changed == {f"{shape.name}.weight" for shape in module_shapes(model) if is_target(shape)} | biases
    assert merged.keys() == expected.keys()
    assert max(float((weight - expected[name]).abs().max()) for name, weight in merged.items()) <= TOLERANCE


@pytest.mark.parametrize("kind", ["both-ends", "embedding-too", "norms", "saved-head", "tokens", "all-biases"])
@pytest.mark.parametrize("architecture", ["llama", "stablelm"])
def test_whole_weights_are_merged_as_peft_does(architecture: str, kind: str, tmp_path: Path) -> None:
    model = save_tiny_model(architecture, tmp_path / "model")
    config = replacing_configs(architecture)[kind]
    adapter = save_adapter(tiny_model(architecture), config, tmp_path / "adapter")
    expected = peft_merged(model, adapter).state_dict()

    assert merge(adapter, model, tmp_path / "out") == ExitCode.OK
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()

    assert merged.keys() == expected.keys()
    assert max(float((weight - expected[name]).abs().max()) for name, weight in merged.items()) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("embedding", "merged into model.embed_tokens, it would change the output head, which has the same weight"),
        ("saved-head", "merged into lm_head, it would change the embedding, which has the same weight"),
    ],
)
def test_one_end_of_a_tied_model_is_not_merged(kind: str, told: str, tmp_path: Path, capsys: Any) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tied=True)
    adapter = save_adapter(tiny_model("llama", tied=True), replacing_configs("llama")[kind], tmp_path / "adapter")

    assert merge(adapter, model, tmp_path / "out") == ExitCode.UNFIT_ADAPTER
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tokens_of_both_ends_of_a_tied_model_are_merged_into_both(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tied=True)
    adapter = save_adapter(tiny_model("llama", tied=True), replacing_configs("llama")["tokens"], tmp_path / "adapter")

    assert merge(adapter, model, tmp_path / "out") == ExitCode.OK
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = torch.tensor([[5, 99, 180, 7]])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)

    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(merged(prompt).logits, adapted(prompt).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", larger_configs("llama", tied=True))
def test_added_tokens_are_merged_into_a_larger_model(kind: str, tied: bool, tmp_path: Path) -> None:
    """Where both ends of a tied model get the same."""
    if kind not in larger_configs("llama", tied=tied):
        pytest.skip("the checkpoint would not bring all rows")
    model = save_tiny_model("llama", tmp_path / "model", tied=tied)
    adapter = save_larger("llama", larger_configs("llama", tied=tied)[kind], tmp_path / "adapter", tied=tied)

    code = merge(adapter, model, tmp_path / "out")
    if tied and kind not in ("larger-untrained", "larger-tokens", "larger-new-tokens"):
        assert code == ExitCode.UNFIT_ADAPTER
        return
    assert code == ExitCode.OK
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    assert merged.config.vocab_size == 323
    expected = peft_logits(peft_model("llama", adapter, tied=tied), FROM_NEW)
    torch.testing.assert_close(peft_logits(merged, FROM_NEW), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen3-moe", "mixtral", "gpt-oss"])
def test_merged_experts_are_those_of_peft(architecture: str, tmp_path: Path) -> None:
    model = save_tiny_model(architecture, tmp_path / "model")
    router = "mlp.router.weight" if architecture == "gpt-oss" else "mlp.gate.weight"
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", router]
    config = lora_config(architecture, 3, target_modules=["q_proj"], target_parameters=parameters)
    adapter = save_adapter(tiny_model(architecture), config, tmp_path / "adapter")
    expected = peft_merged(model, adapter).state_dict()

    assert merge(adapter, model, tmp_path / "out") == ExitCode.OK
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    changed = {name for name, weight in merged.items() if not torch.equal(weight, before[name])}

    layers = [f"model.layers.{layer}" for layer in range(2)]
    names = [f"{layer}.{name}" for layer in layers for name in ("self_attn.q_proj.weight", *parameters)]
    assert changed == set(names)
    assert max(float((weight - expected[name]).abs().max()) for name, weight in merged.items()) <= TOLERANCE


def test_a_model_of_16_bits_stays_so_and_each_weight_is_rounded_once(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "model")
    adapter = save_adapter(tiny_model("llama"), gralora_config("llama", 8, 2, hybrid_r=2), tmp_path / "adapter")
    exact = PeftModel.from_pretrained(half.float(), adapter).merge_and_unload().state_dict()

    assert merge(adapter, tmp_path / "model", tmp_path / "out") == ExitCode.OK
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()

    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    for name, weight in merged.items():
        torch.testing.assert_close(weight.float(), exact[name], rtol=2**-8, atol=1e-6)


def test_the_directory_is_whole(tmp_path: Path, capsys) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    adapter = save_adapter(tiny_model("llama"), lora_config("llama", 4), tmp_path / "adapter")

    assert merge(adapter, model, tmp_path / "out", "--json") == ExitCode.OK
    said = json.loads(capsys.readouterr().out)
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (model, tmp_path / "out")]

    assert (said["path"], said["num_modules"], said["dtype"]) == (str(tmp_path / "out"), 14, "float32")
    assert list((tmp_path / "out").glob("*.safetensors"))
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[1].chat_template == CHAT_TEMPLATE
    assert tokenizers[1].eos_token_id == tokenizers[0].eos_token_id


def test_an_activated_adapter_is_refused_because_its_weights_are_not_for_all_tokens(tmp_path: Path, capsys) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    config = lora_config("llama", 4, alora_invocation_tokens=[5, 6])
    adapter = save_adapter(tiny_model("llama"), config, tmp_path / "adapter")
    loaded = load("adapter", adapter, module_shapes(model), torch.float32, max_width=64)
    told = "alora_invocation_tokens: [5, 6] leaves the tokens before them to the base model"

    assert merge(adapter, model, tmp_path / "out") == ExitCode.UNFIT_ADAPTER
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterRejectedError, match=re.escape(told)):
        merge_adapter(tiny_model("llama"), loaded)


def test_nothing_is_written_over_what_is_there(tmp_path: Path, capsys) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    adapter = save_adapter(tiny_model("llama"), lora_config("llama", 4), tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in model.iterdir()}

    assert merge(adapter, model, model) == ExitCode.USAGE

    assert "is not an empty directory" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in model.iterdir()}


def test_an_adapter_that_does_not_fit_is_exit_code_4(tmp_path: Path, capsys) -> None:
    model = save_tiny_model("gpt2", tmp_path / "model")

    assert merge(write_gralora(tmp_path / "a"), model, tmp_path / "out") == ExitCode.UNFIT_ADAPTER

    assert "it matches no module of the base model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_update_that_overflows_the_models_dtype_is_refused(tmp_path: Path, capsys) -> None:
    save_tiny_model("llama", tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float16).save_pretrained(tmp_path / "model")
    config = lora_config("llama", 4, target_modules=["q_proj"], alpha=10**9)
    adapter = save_adapter(tiny_model("llama"), config, tmp_path / "adapter")

    assert merge(adapter, tmp_path / "model", tmp_path / "out") == ExitCode.UNFIT_ADAPTER

    assert "it makes values that are not finite in torch.float16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_that_is_not_whole_is_an_error_in_one_line(missing: str, tmp_path: Path, capsys) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    adapter = save_adapter(tiny_model("llama"), lora_config("llama", 4), tmp_path / "adapter")
    (model / missing).unlink()

    assert merge(adapter, model, tmp_path / "out") != ExitCode.OK

    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")] != []
    assert not (tmp_path / "out").exists()
