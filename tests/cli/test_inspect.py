"""`gralora adapters inspect`, and the shapes of a model that it compares with."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from support.checkpoints import edit_tensors, write_gralora, write_lora
from support.hostile import write_hostile
from support.peft_adapters import save_adapter
from support.tiny_models import save_tiny_model, tiny_config, tiny_model

from gralora_runtime.adapters.checkpoint.doubts import CHANGES_NOTHING
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.errors import ModelUnsupportedError
from gralora_runtime.model.adaptable import adaptable_modules, changeable_modules, weight_norms
from gralora_runtime.model.module_shapes import module_shapes
from gralora_server.cli.app import run
from gralora_server.cli.output import ExitCode


def config_dir(architecture: str, folder: Path) -> Path:
    """A base model without its weights: a config is all that is needed."""
    tiny_config(architecture).save_pretrained(folder)
    return folder


def inspected(capsys) -> dict[str, object]:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_shapes_from_the_config_are_those_of_the_model(architecture: str, tmp_path: Path) -> None:
    shapes = module_shapes(config_dir(architecture, tmp_path), max_added_tokens=0)

    assert shapes == [shape for shape, _ in changeable_modules(tiny_model(architecture))]
    assert [shape.name for shape in shapes if "head" in shape.name or "embed" in shape.name] == [
        "lm_head",
        *([] if architecture == "gpt2" else ["model.embed_tokens"]),
    ]


def test_shapes_of_a_convolution_style_linear_are_in_and_out(tmp_path: Path) -> None:
    """GPT-2 keeps its weights as [in, out]."""
    shapes = {shape.name: shape for shape in module_shapes(config_dir("gpt2", tmp_path))}

    assert shapes["transformer.h.0.attn.c_attn"] == ModuleShape(
        "transformer.h.0.attn.c_attn", 64, 192, transposed=True, has_bias=True
    )


@pytest.mark.parametrize("content", [None, '{"model_type": "no-such-model"}', '{"model_type": "vit"}'], ids=str)
def test_a_directory_that_is_no_causal_lm_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)

    with pytest.raises(ModelUnsupportedError):
        module_shapes(tmp_path)


def test_inspect_says_what_an_adapter_is(tmp_path: Path, capsys) -> None:
    adapter = write_gralora(tmp_path / "a", r=8, k=2, hybrid_r=4)

    assert run(["adapters", "inspect", str(adapter), "--json"]) == ExitCode.OK
    facts = inspected(capsys)

    assert (facts["dialect"], facts["r"], facts["k"], facts["hybrid_r"]) == ("gralora", 8, 2, 4)
    assert facts["lora_equivalent_rank"] == 20
    assert facts["targets"] == {
        "model.layers.*.mlp.down_proj": 2,
        "model.layers.*.self_attn.q_proj": 2,
        "model.layers.*.self_attn.v_proj": 2,
    }
    assert facts["tensor_bytes"] == (adapter / "adapter_model.safetensors").stat().st_size - _header_bytes(adapter)
    assert facts["fits"] is None


def test_inspect_tells_the_authors_dialect_by_its_config(tmp_path: Path, capsys) -> None:
    run(["adapters", "inspect", str(write_gralora(tmp_path / "a", r=8, k=2, hybrid_r=4, authors=True)), "--json"])
    facts = inspected(capsys)

    assert (facts["dialect"], facts["r"], facts["hybrid_r"], facts["scale"]) == ("gralora-authors", 8, 4, 16 / 12)


def test_inspect_says_that_an_adapter_fits(tmp_path: Path, capsys) -> None:
    model = config_dir("llama", tmp_path / "model")
    modules = [shape for shape in module_shapes(model) if shape.name.endswith("q_proj")]
    adapter = write_lora(tmp_path / "a", modules, r=4, target_modules=["q_proj"])

    assert run(["adapters", "inspect", str(adapter), "--model", str(model), "--json"]) == ExitCode.OK
    facts = inspected(capsys)

    assert facts["fits"] is True
    assert facts["problems"] == []
    assert facts["cpu_pool_bytes"] == 4 * 2 * 4 * (64 + 64)


def test_an_adapter_that_does_not_fit_is_exit_code_4_with_every_reason(tmp_path: Path, capsys) -> None:
    model = config_dir("gpt2", tmp_path / "model")
    adapter = write_gralora(tmp_path / "a")

    assert run(["adapters", "inspect", str(adapter), "--model", str(model), "--json"]) == ExitCode.UNFIT_ADAPTER
    out, err = capsys.readouterr()
    facts = json.loads(out)

    assert facts["fits"] is False
    assert facts["problems"][0].startswith("it matches no module of the base model: its tensors are called base_model.")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_where_an_activated_adapter_begins_is_told_and_held_against_the_model(tmp_path: Path, capsys) -> None:
    model = config_dir("llama", tmp_path / "model")
    modules = [shape for shape in module_shapes(model) if shape.name.endswith("q_proj")]
    options = {"target_modules": ["q_proj"], "alora_invocation_tokens": [5, 319]}
    fits = write_lora(tmp_path / "a", modules, **options)
    does_not = write_lora(tmp_path / "b", modules, **options | {"alora_invocation_tokens": [5, 320]})

    assert run(["adapters", "inspect", str(fits), "--model", str(model), "--json"]) == ExitCode.OK
    facts = inspected(capsys)
    assert facts["invocation"] == [5, 319]
    assert [warning[:58] for warning in facts["warnings"]] == [
        "its config has alora_invocation_tokens: [5, 319], from who"
    ]

    assert run(["adapters", "inspect", str(does_not), "--model", str(model), "--json"]) == ExitCode.UNFIT_ADAPTER
    (problem,) = inspected(capsys)["problems"]
    assert problem == "alora_invocation_tokens[1]: 320 is not a token id of this model (0 to 319)"


def test_a_broken_adapter_is_exit_code_4(tmp_path: Path, capsys) -> None:
    adapter = write_gralora(tmp_path / "a", use_dora=True, modules_to_save="lm_head")

    assert run(["adapters", "inspect", str(adapter)]) == ExitCode.UNFIT_ADAPTER
    out, err = capsys.readouterr()

    assert out == ""
    assert "use_dora" in err
    assert "modules_to_save" in err


def test_inspect_for_people(tmp_path: Path, capsys) -> None:
    assert run(["adapters", "inspect", str(write_gralora(tmp_path / "a", r=8, k=2))]) == ExitCode.OK
    out = capsys.readouterr().out

    assert "r = 8, k = 2" in out
    assert "of rank 16" in out


def test_what_a_stranger_wrote_is_not_taken_for_markup(tmp_path: Path, capsys) -> None:
    adapter = write_gralora(tmp_path / "[x]", base_model_name_or_path="[/bold] [red]model")

    assert run(["adapters", "inspect", str(adapter)]) == ExitCode.OK
    out = capsys.readouterr().out

    assert "[x]" in out
    assert "[/bold] [red]model" in out


def test_another_base_model_is_a_warning(tmp_path: Path, capsys) -> None:
    model = config_dir("llama", tmp_path / "model")
    modules = [shape for shape in module_shapes(model) if shape.name.endswith("q_proj")]
    adapter = write_lora(tmp_path / "a", modules, target_modules=["q_proj"], base_model_name_or_path="[red]other")

    assert run(["adapters", "inspect", str(adapter), "--json"]) == ExitCode.OK
    assert inspected(capsys)["warnings"] == []
    assert run(["adapters", "inspect", str(adapter), "--model", str(model)]) == ExitCode.OK
    assert "names the base model '[red]other', and this one is called 'model'" in capsys.readouterr().out


def test_what_is_odd_about_weights_is_told_when_they_are_read(tmp_path: Path, capsys) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    modules = [shape for shape in module_shapes(model) if shape.name.endswith("q_proj")]
    usual, huge = (
        write_lora(tmp_path / name, modules, target_modules=["q_proj"], lora_alpha=alpha)
        for name, alpha in (("usual", 1e-3), ("huge", 1e3))
    )

    assert run(["adapters", "inspect", str(usual), "--model", str(model), "--weights", "--json"]) == ExitCode.OK
    assert inspected(capsys)["warnings"] == []
    assert run(["adapters", "inspect", str(huge), "--model", str(model), "--json"]) == ExitCode.OK
    assert inspected(capsys)["warnings"] == []
    assert run(["adapters", "inspect", str(huge), "--model", str(model), "--weights", "--json"]) == ExitCode.OK
    (warning,) = inspected(capsys)["warnings"]
    assert warning.startswith("in 2 of 2 modules it adds more than 10 times the weight's own norm: model.layers.")


def test_an_adapter_that_was_not_trained_is_told_of(tmp_path: Path, capsys) -> None:
    """As PEFT makes it: A is random, and all B are zero."""
    model = save_tiny_model("llama", tmp_path / "model")
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = save_adapter(tiny_model("llama"), config, tmp_path / "a")

    assert run(["adapters", "inspect", str(adapter), "--model", str(model), "--weights", "--json"]) == ExitCode.OK
    facts = inspected(capsys)

    assert (facts["fits"], facts["warnings"]) == (True, [CHANGES_NOTHING])


@pytest.mark.parametrize("weights", [(), ("--weights",)], ids=["headers", "weights"])
def test_strange_names_and_stamps_are_told(tmp_path: Path, weights: tuple[str, ...], capsys) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    modules = [shape for shape in module_shapes(model) if shape.name.endswith("q_proj")]
    adapter = write_lora(tmp_path / "a", modules, target_modules=["q_proj"], lora_alpha=1e-3, unsloth_fixed=True)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("base_model.model.model", "model.language_model")] = tensors.pop(name)

    edit_tensors(adapter, rename)
    assert run(["adapters", "inspect", str(adapter), "--model", str(model), *weights, "--json"]) == ExitCode.OK
    facts = inspected(capsys)
    assert run(["adapters", "inspect", str(adapter), "--model", str(model), *weights]) == ExitCode.OK
    shown = " ".join(capsys.readouterr().out.split())

    (warning,) = facts["warnings"]
    assert warning.startswith("its config has unsloth_fixed: True, ")
    assert facts["fits"] is True
    assert facts["targets"] == {"model.language_model.layers.*.self_attn.q_proj": 2}
    assert facts["tensor_names"] == [
        "base_model.model. does not stand before them",
        "what is model.language_model.* in the model that it was trained in is model.* in this one",
    ]
    assert all(sentence in shown for sentence in facts["tensor_names"])


def test_a_key_that_an_operator_allows_is_a_warning(tmp_path: Path, capsys) -> None:
    adapter = str(write_gralora(tmp_path / "a", run_id=7, seed_of_it=3))
    allowed = ["--allow-unknown-config-key", "run_id", "--allow-unknown-config-key", "seed_of_it"]

    assert run(["adapters", "inspect", adapter, *allowed[:2]]) == ExitCode.UNFIT_ADAPTER
    assert "seed_of_it: 3 is not known here" in capsys.readouterr().err
    assert run(["adapters", "inspect", adapter, *allowed, "--weights", "--json"]) == ExitCode.OK
    assert [warning.split(",")[0] for warning in inspected(capsys)["warnings"]] == [
        "its config has run_id: 7",
        "its config has seed_of_it: 3",
    ]


def test_an_adapter_that_changes_nothing_needs_no_model_to_be_told(tmp_path: Path, capsys) -> None:
    adapter = write_gralora(tmp_path / "a", alpha=0)

    assert run(["adapters", "inspect", str(adapter), "--weights"]) == ExitCode.OK
    assert "it changes nothing" in capsys.readouterr().out


def test_broken_weights_are_exit_code_4_when_they_are_read(tmp_path: Path, capsys) -> None:
    adapter = edit_tensors(
        write_gralora(tmp_path / "a"), lambda tensors: [t.fill_(torch.inf) for t in tensors.values()]
    )

    assert run(["adapters", "inspect", str(adapter)]) == ExitCode.OK
    assert run(["adapters", "inspect", str(adapter), "--weights"]) == ExitCode.UNFIT_ADAPTER
    assert "values that are not finite" in capsys.readouterr().err


def test_norms_of_weights_are_the_dense_ones() -> None:
    model = tiny_model("gpt2")

    norms = weight_norms(model)
    expected = float(model.transformer.h[0].attn.c_attn.weight.detach().norm())

    assert norms["transformer.h.0.attn.c_attn"] == pytest.approx(expected, rel=1e-6)
    assert set(norms) == {shape.name for shape, _ in adaptable_modules(model)}


HOSTILE = ("target-empty-alternatives", "rank-pattern-back-references", "layers-pattern", "sizes-of-4200-digits",
           "forty-thousand-tensors", "weights-are-a-pipe", "weights-are-nowhere", "deep-json")  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    write_hostile(write_gralora(root / "good"), root / "adapters")
    return root


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_adapter_is_exit_code_4_in_two_seconds(hostile: Path, name: str, capsys) -> None:
    """Each of the others is looked into by the server's own tests, through the same door."""
    model = config_dir("llama", hostile / "model")
    started_s = time.thread_time()

    code = run(["adapters", "inspect", str(hostile / "adapters" / name), "--model", str(model)])

    assert code == ExitCode.UNFIT_ADAPTER
    assert capsys.readouterr().err.startswith("error: ")
    assert time.thread_time() - started_s < 2.0


def _header_bytes(adapter: Path) -> int:
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
