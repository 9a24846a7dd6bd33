"""Adapters of one recipe share what was found out about where their matrices go; others never do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import MODULES, edit_tensors, write_gralora, write_lora
from torch import Tensor

from gralora_runtime.adapters.checkpoint import remembered
from gralora_runtime.adapters.checkpoint.header import inspect
from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.adapters.checkpoint.recipe import Recipe, recipe_of


def recipe_at(path: Path, *, keeps_16_bit: bool = False) -> Recipe:
    header = inspect(path)
    return recipe_of(header.fitting_plan(MODULES), header.tensors, torch.float32, keeps_16_bit=keeps_16_bit)


def halve(tensors: dict[str, Tensor]) -> None:
    tensors.update({name: tensor.half() for name, tensor in tensors.items()})


def test_adapters_of_one_recipe_share_their_layout_and_differ_in_weights(tmp_path: Path) -> None:
    paths = [write_gralora(tmp_path / f"a{seed}", r=4, k=2, seed=seed) for seed in range(2)]
    first, second = (load("a", path, MODULES, torch.float32, max_width=64) for path in paths)

    assert recipe_at(paths[0]) is recipe_at(paths[1])
    assert first.layout.modules is second.layout.modules
    assert first.digest != second.digest
    assert not torch.equal(first.blob, second.blob)


def test_whatever_differs_in_rank_kind_or_storage_has_a_recipe_of_its_own(tmp_path: Path) -> None:
    written = [
        write_gralora(tmp_path / "r4", r=4, k=2),
        write_gralora(tmp_path / "r8", r=8, k=2),
        write_gralora(tmp_path / "k4", r=4, k=4),
        write_lora(tmp_path / "lora", r=4),
        edit_tensors(write_gralora(tmp_path / "half", r=4, k=2), halve),
    ]
    recipes = [recipe_at(path, keeps_16_bit=keeps) for path in written for keeps in (True, False)]
    assert len({id(found) for found in recipes}) == len(recipes)
    assert len({found.description for found in recipes}) == len(written)


@pytest.mark.parametrize("kept", [0, 10_000])
def test_it_is_the_same_whether_it_was_remembered_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    path = write_gralora(tmp_path / "a", r=4, k=2, hybrid_r=2)
    expected = recipe_at(path)
    monkeypatch.setattr(remembered, "MAX_LENGTH", kept)
    assert recipe_at(path) == expected
    assert (recipe_at(path) is expected) == bool(kept)
