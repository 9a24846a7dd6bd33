"""Triton's interpreter without what it does again and again: the same results in two thirds of the time.

Each call of a function within a kernel puts interpreted twins into triton's language modules, where the kernel's own
launch has put them already; and each look at a dtype makes the whole table of numpy's anew.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

ADDRESS = np.dtype(np.uint64)


class _Patched:
    """Which modules of the language the kernel that runs has patched."""

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self._patch = patch
        self._done: set[frozenset[str]] = set()

    def __call__(self, function: Any) -> Any:
        seen = frozenset(
            value.__name__
            for value in function.__globals__.values()
            if inspect.ismodule(value) and value in (tl, tl.core)
        )
        if seen in self._done:
            return None  # to a call within a kernel, which restores nothing
        scope = self._patch(function)
        if not self._done:
            restore = scope.restore
            scope.restore = lambda: (self._done.clear(), restore())
        self._done.add(seen)
        return scope


def make_quick() -> None:
    """For the rest of this process."""
    twin_of = functools.cache(interpreter._get_np_dtype)

    def numpy_dtype(dtype: tl.dtype) -> np.dtype:
        element = dtype.scalar
        return ADDRESS if isinstance(element, tl.pointer_type) else twin_of(element)

    interpreter._patch_lang = _Patched(interpreter._patch_lang)
    interpreter._get_np_dtype = numpy_dtype
