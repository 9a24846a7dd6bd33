"""`gralora adapters diff`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import (
    MODULES,
    edit_config,
    edit_tensors,
    lora_config,
    lora_tensors,
    write_checkpoint,
    write_gralora,
    write_lora,
)
from support.tiny_models import tiny_config

from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.model.module_shapes import module_shapes
from gralora_server.cli.app import run
from gralora_server.cli.output import ExitCode

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def diff(a: Path, b: Path, capsys, *options: str) -> tuple[int, dict[str, Any]]:
    code = run(["adapters", "diff", str(a), str(b), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def test_an_adapter_is_equal_to_its_copy(tmp_path: Path, capsys) -> None:
    code, found = diff(write_gralora(tmp_path / "a"), write_gralora(tmp_path / "b"), capsys)

    assert code == ExitCode.OK
    assert found["equal"] is True
    assert found["config"] == {}
    assert {module["relative"] < 1e-12 for module in found["modules"]} == {True}
    assert len(found["modules"]) == len(MODULES)


def test_dialects_of_the_same_adapter_have_one_digest(tmp_path: Path, capsys) -> None:
    peft = write_gralora(tmp_path / "peft", hybrid_r=4)
    authors = write_gralora(tmp_path / "authors", hybrid_r=4, authors=True)

    code, found = diff(peft, authors, capsys)

    assert code == ExitCode.OK
    assert found["config"] == {"dialect": {"a": "gralora", "b": "gralora-authors"}}


def test_the_module_that_changed_most_comes_first(tmp_path: Path, capsys) -> None:
    a, b = write_gralora(tmp_path / "a"), write_gralora(tmp_path / "b")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q0}.gralora_B"] *= 3
        tensors[f"{Q0.replace('0', '1')}.gralora_B"] *= 2

    code, found = diff(a, edit_tensors(b, change), capsys)
    first, second, third, *_ = found["modules"]

    assert code == ExitCode.DIFFERENT == 1
    assert found["digests"]["a"] != found["digests"]["b"]
    assert first["module"] == "model.layers.0.self_attn.q_proj"
    assert first["relative"] == pytest.approx(2 / 3)
    assert first["norm_b"] == pytest.approx(3 * first["norm_a"])
    assert (second["module"], second["relative"]) == ("model.layers.1.self_attn.q_proj", pytest.approx(0.5))
    assert third["relative"] < 1e-12


def test_configs_differ_in_our_words_and_norms_are_of_the_dense_update(tmp_path: Path, capsys) -> None:
    a = write_gralora(tmp_path / "a", r=8, k=2, base_model_name_or_path="one")
    b = write_lora(tmp_path / "b", MODULES[:3], r=4)

    code, found = diff(a, b, capsys)
    tensors = load_file(b / WEIGHTS_FILE)
    expected = 4 * (tensors[f"{Q0}.lora_B.weight"] @ tensors[f"{Q0}.lora_A.weight"]).norm()
    q0 = next(module for module in found["modules"] if module["module"] == "model.layers.0.self_attn.q_proj")

    assert code == ExitCode.DIFFERENT
    assert found["config"]["dialect"] == {"a": "gralora", "b": "lora"}
    assert (found["config"]["k"], found["config"]["r"]) == ({"a": 2, "b": 1}, {"a": 8, "b": 4})
    assert found["config"]["scale"] == {"a": 2.0, "b": 4.0}
    assert len(found["config"]["targets"]["a"]) == 2 * len(found["config"]["targets"]["b"])
    assert q0["norm_b"] == pytest.approx(float(expected), rel=1e-5)
    only_in_a = [module for module in found["modules"] if module["norm_b"] == 0]
    assert {(module["relative"], module["module"][:14]) for module in only_in_a} == {(1.0, "model.layers.1")}


def test_the_same_weights_that_begin_at_other_tokens_differ(tmp_path: Path, capsys) -> None:
    a, b = (write_lora(tmp_path / name, alora_invocation_tokens=[5, len(name)]) for name in ("a", "bb"))

    code, found = diff(a, b, capsys)

    assert code == ExitCode.DIFFERENT
    assert found["config"] == {"invocation": {"a": [5, 1], "b": [5, 2]}}
    assert max(module["relative"] for module in found["modules"]) <= 1e-12
    assert run(["adapters", "diff", str(a), str(b)]) == ExitCode.DIFFERENT
    assert "5, 2" in capsys.readouterr().out


def test_targets_are_shown_as_patterns(tmp_path: Path, capsys) -> None:
    a, b = write_lora(tmp_path / "a", MODULES[:2]), write_lora(tmp_path / "b", MODULES[:1])

    assert run(["adapters", "diff", str(a), str(b)]) == ExitCode.DIFFERENT
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("targets"))

    assert line.count("model.layers.*.self_attn.q_proj (1)") == 2
    assert line.count("model.layers.*") == 3


def test_adapters_of_models_of_other_widths_have_no_difference_to_measure(tmp_path: Path, capsys) -> None:
    narrow = write_lora(tmp_path / "narrow", MODULES[:1], target_modules=["q_proj"])
    wide = tmp_path / "wide"
    tensors = {name: torch.cat([t, t], dim=1) for name, t in lora_tensors(MODULES[:1]).items() if "lora_A" in name}
    tensors |= {name: torch.cat([t, t]) for name, t in lora_tensors(MODULES[:1]).items() if "lora_B" in name}
    write_checkpoint(wide, lora_config(target_modules=["q_proj"]), tensors)

    code, found = diff(narrow, wide, capsys)

    assert code == ExitCode.DIFFERENT
    assert (found["modules"][0]["difference"], found["modules"][0]["relative"]) == (None, None)
    assert run(["adapters", "diff", str(narrow), str(wide)]) == ExitCode.DIFFERENT
    assert "other widths" in capsys.readouterr().out


def test_with_a_model_digests_are_the_loaders(tmp_path: Path, capsys) -> None:
    """Modules are then in the model's order, and not in that of their names."""
    tiny_config("llama").save_pretrained(tmp_path / "model")
    shapes = [shape for shape in module_shapes(tmp_path / "model") if shape.name.endswith(("q_proj", "k_proj"))]
    adapter = write_lora(tmp_path / "a", shapes, target_modules=["q_proj", "k_proj"])

    code, found = diff(adapter, adapter, capsys, "--model", str(tmp_path / "model"))

    assert code == ExitCode.OK
    assert found["digests"]["a"] == load("a", adapter, shapes, torch.float32, max_width=64).digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_same_weights_in_another_dtype(tmp_path: Path, dtype: torch.dtype, capsys) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    a, b = write_gralora(tmp_path / "a"), edit_tensors(write_gralora(tmp_path / "b"), convert)

    code, found = diff(a, b, capsys)

    assert code == ExitCode.DIFFERENT
    assert set(found["config"]) == {"dtypes"}
    assert max(module["relative"] for module in found["modules"]) < 0.01


def test_the_table_for_people_has_forty_lines_at_most(tmp_path: Path, capsys) -> None:
    modules = [type(MODULES[0])(f"model.layers.{layer}.q_proj", 8, 8) for layer in range(50)]
    a = write_lora(tmp_path / "a", modules, target_modules=["q_proj"], base_model_name_or_path="[red]one")
    b = write_lora(tmp_path / "b", modules, target_modules=["q_proj"], seed=1)

    assert run(["adapters", "diff", str(a), str(b)]) == ExitCode.DIFFERENT
    lines = capsys.readouterr().out.splitlines()

    assert len([line for line in lines if "model.layers." in line]) == 40
    assert any("and 10 more modules" in line for line in lines)
    assert any("[red]one" in line for line in lines)


def test_a_broken_adapter_is_exit_code_4(tmp_path: Path, capsys) -> None:
    good, bad = write_gralora(tmp_path / "good"), write_gralora(tmp_path / "bad")
    edit_tensors(bad, lambda tensors: tensors.pop(f"{Q0}.gralora_B"))
    nan = edit_tensors(write_gralora(tmp_path / "nan"), lambda tensors: tensors[f"{Q0}.gralora_A"].fill_(torch.nan))

    assert run(["adapters", "diff", str(good), str(bad)]) == ExitCode.UNFIT_ADAPTER
    assert f"tensor {Q0}.gralora_B is missing" in capsys.readouterr().err
    assert run(["adapters", "diff", str(nan), str(good)]) == ExitCode.UNFIT_ADAPTER
    assert f"tensor {Q0}.gralora_A has values that are not finite" in capsys.readouterr().err
    assert run(["adapters", "diff", str(good), str(edit_config(bad, use_dora=True))]) == ExitCode.UNFIT_ADAPTER
