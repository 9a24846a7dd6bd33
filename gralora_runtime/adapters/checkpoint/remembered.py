"""Remembers what follows from a plan and the tensors of a file, which adapters of one recipe share. Knows neither.

Finding it out anew takes longer than reading a small adapter, and holds the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from functools import lru_cache
from typing import Any, TypeVar, TypeVarTuple

Plan = TypeVar("Plan")
Tensors = TypeVar("Tensors", bound=Sized)
Others = TypeVarTuple("Others")
Result = TypeVar("Result")

MAX_KEPT = 64  # results of one function
MAX_KEPT_TENSORS = 2_000  # if what follows from more were kept, a few strangers' could fill memory


class _Same:
    """Compares by identity. Of one recipe, plans and tensors are the same objects, because those too are remembered."""

    __slots__ = ("it",)

    def __init__(self, it: Any) -> None:
        self.it = it

    def __hash__(self) -> int:
        return id(self.it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.it is other.it


def remembered(
    function: Callable[[Plan, Tensors, *Others], Result],
) -> Callable[[Plan, Tensors, *Others], Result]:
    """Called again with the same two objects, and equal others, `function` is not asked again. Errors are not kept."""

    @lru_cache(maxsize=MAX_KEPT)
    def ask_once(plan: _Same, tensors: _Same, *others: Any) -> Result:
        return function(plan.it, tensors.it, *others)

    def ask(plan: Plan, tensors: Tensors, *others: *Others) -> Result:
        if len(tensors) > MAX_KEPT_TENSORS:
            return function(plan, tensors, *others)
        return ask_once(_Same(plan), _Same(tensors), *others)

    return ask
