"""Functions that are compiled once and called by their symbol, and the kernels that Python calls.

Left to itself, Numba links all that a function calls into it, and optimises the whole anew at each level: products were
compiled a dozen times over, and a server's first start took a minute of it. A symbol is looked up when its caller is
loaded, also from the cache, so what a kernel calls has to be there before: `load` sees to that.
"""

# mypy: disable-error-code="misc, no-untyped-call"

from __future__ import annotations

import inspect
import threading
import typing
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
from numba import cfunc, njit, types
from numba.core.datamodel import models
from numba.core.dispatcher import Dispatcher
from numba.extending import register_model

TYPES = {
    int: types.int64,
    float: types.float64,
    type(None): types.void,
    npt.NDArray[np.int64]: types.CPointer(types.int64),  # to be called with `array.ctypes`
}


_loading = threading.RLock()


class Loadable(Protocol):
    """What is in the cache, or has to be compiled."""

    def load(self) -> bool:
        """With all that it calls; whether something had to be compiled."""


class Separate(types.ExternalFunction):
    """A function of addresses and numbers. Numba keeps no closure in its cache: it must have none. What it would raise
    is printed and goes no further.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        result, *arguments = _signature_types(function)
        super().__init__(f"gralora_{function.__qualname__}", result(*arguments))
        self._function = function
        self._compiled: Any = None

    def load(self) -> bool:
        with _loading:
            if self._compiled is not None:
                return False
            called_anew = _load_called(self._function)
            self._compiled = cfunc(self.sig, cache=True)(self._function)
            llvm.add_symbol(self.symbol, self._compiled.address)
            return called_anew or not self._compiled.cache_hits


register_model(Separate)(models.OpaqueModel)


def _signature_types(function: Callable[..., Any]) -> list[Any]:
    """Of the result, and of each argument in order."""
    hints = typing.get_type_hints(function)
    return [TYPES[hints[name]] for name in ("return", *inspect.signature(function).parameters)]


class Kernel:
    """A compiled function that Python calls. `load` compiles it for its usual types; others are compiled when met."""

    def __init__(self, function: Callable[..., Any], signature: str, *, parallel: bool) -> None:
        self._dispatcher = njit(nogil=True, parallel=parallel, cache=True)(function)
        self._signature = signature
        self._is_loaded = False

    def load(self) -> bool:
        with _loading:
            if self._is_loaded:
                return False
            called_anew = _load_called(self._dispatcher.py_func)
            self._dispatcher.compile(self._signature)
            self._is_loaded = True
            return called_anew or not self._dispatcher.stats.cache_hits

    def __call__(self, *args: Any) -> Any:
        if not self._is_loaded:
            self.load()
        return self._dispatcher(*args)


def kernel(signature: str, *, parallel: bool = False) -> Callable[[Callable[..., Any]], Kernel]:
    """`signature`: the types that it is called with as a rule, in Numba's words."""
    return lambda function: Kernel(function, signature, parallel=parallel)


def _load_called(function: Callable[..., Any]) -> bool:
    compiled = [called.load() for called in _called(function, set())]  # all of them
    return any(compiled)


def _called(function: Callable[..., Any], seen: set[object]) -> Iterator[Separate]:
    """By itself, or by what is linked into it."""
    names = inspect.getclosurevars(function)
    for one in (*names.nonlocals.values(), *names.globals.values()):
        if isinstance(one, Separate):
            yield one
        elif isinstance(one, Dispatcher) and one not in seen:
            seen.add(one)
            yield from _called(one.py_func, seen)
