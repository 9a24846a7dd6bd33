"""Names for functions of which a factory makes several.

Numba tells those of one name apart by a number, which counts what a process has compiled. What two processes compiled
and a third takes out of the cache may then have one symbol for two functions, of which the linker keeps one: products
of float16 were computed as those of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def variant(*what: object) -> Callable[[Function], Function]:
    """Puts what the factory was called with into the function's name. Numba's decorator comes after it."""

    def name(function: Function) -> Function:
        suffix = "_".join(["", *map(str, what)])
        function.__name__ += suffix
        function.__qualname__ += suffix
        return function

    return name
