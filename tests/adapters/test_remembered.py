"""What follows from two objects is found out once for these two, and for no others that look like them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import MODULES, edit_config, edit_tensors, write_gralora

from gralora_runtime.adapters.checkpoint import remembered as module
from gralora_runtime.adapters.checkpoint.header import inspect
from gralora_runtime.adapters.checkpoint.remembered import remembered
from gralora_runtime.errors import AdapterRejectedError


class Counting:
    """A function that is remembered, and how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.ask = remembered(self._ask)

    def _ask(self, long: list[int], other: dict[str, int], more: int) -> tuple[int, int]:
        self.asked += 1
        return sum(long), other["factor"] // more


def test_the_same_objects_are_asked_about_once_and_equal_ones_anew() -> None:
    function, long, other = Counting(), [1, 2], {"factor": 6}

    assert [function.ask(long, other, 2) for _ in range(3)] == [(3, 3)] * 3
    assert function.asked == 1
    assert function.ask(list(long), other, 2) == function.ask(long, dict(other), 2) == (3, 3)
    assert function.asked == 3
    assert function.ask(long, other, 3) == (3, 2)
    assert function.asked == 4


def test_neither_errors_nor_what_follows_from_long_objects_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    function, long, other = Counting(), [1, 2], {"factor": 6}
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            function.ask(long, other, 0)
    assert function.asked == 2

    monkeypatch.setattr(module, "MAX_LENGTH", 1)
    assert function.ask(long, other, 2) == function.ask(long, other, 2)
    assert function.asked == 4


def test_objects_that_are_remembered_are_not_mistaken_for_later_ones_in_the_same_memory() -> None:
    function = Counting()

    assert [function.ask([i], {"factor": i}, 1) for i in range(100)] == [(i, i) for i in range(100)]


def test_one_that_fits_lets_no_other_in(tmp_path: Path) -> None:
    """Nor does it lend it its summary."""
    one = inspect(write_gralora(tmp_path / "one", base_model_name_or_path="one"))
    other = inspect(write_gralora(tmp_path / "other", seed=1, base_model_name_or_path="other"))
    larger = inspect(edit_config(write_gralora(tmp_path / "larger"), r=64))
    cut = inspect(edit_tensors(write_gralora(tmp_path / "cut"), lambda tensors: tensors.popitem()))

    assert one.tensors is other.tensors
    assert one.fitting_plan(MODULES) is other.fitting_plan(MODULES)
    assert (one.summary(MODULES).base_model, other.summary(MODULES).base_model) == ("one", "other")
    for header, told in ((larger, "the base model needs"), (cut, "is missing")):
        for _ in range(2):
            with pytest.raises(AdapterRejectedError, match=told):
                header.fitting_plan(MODULES)
