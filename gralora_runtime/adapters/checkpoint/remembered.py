"""Remembers what follows from two objects that adapters of one recipe share, like a file's tensors and a plan for them.

Knows neither. Finding it out anew takes longer than reading a small adapter, and holds the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from functools import lru_cache
from typing import Any, TypeVar, TypeVarTuple

Long = TypeVar("Long", bound=Sized)
Other = TypeVar("Other")
More = TypeVarTuple("More")
Result = TypeVar("Result")

MAX_KEPT = 64  # results of one function
MAX_LENGTH = 2_000  # if what follows from longer ones were kept, a few strangers' could fill memory


class _Same:
    """Compares by identity. Of one recipe the objects are the same, because those too are remembered."""

    __slots__ = ("it",)

    def __init__(self, it: Any) -> None:
        self.it = it

    def __hash__(self) -> int:
        return id(self.it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.it is other.it


def remembered(function: Callable[[Long, Other, *More], Result]) -> Callable[[Long, Other, *More], Result]:
    """Called again with the same two objects, and more that is equal, `function` is not asked again.

    Errors are not kept, nor what follows from an object that is long.
    """

    @lru_cache(maxsize=MAX_KEPT)
    def ask_once(long: _Same, other: _Same, *more: Any) -> Result:
        return function(long.it, other.it, *more)

    def ask(long: Long, other: Other, *more: *More) -> Result:
        if len(long) > MAX_LENGTH:
            return function(long, other, *more)
        return ask_once(_Same(long), _Same(other), *more)

    return ask
