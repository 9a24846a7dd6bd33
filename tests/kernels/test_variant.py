"""Functions that factories make: each has a name of its own, or a cache could give one for another."""

from __future__ import annotations

import gc
from collections import Counter

from numba.core.dispatcher import Dispatcher

from gralora_kernels.cpu import backend, program, sha256  # noqa: F401  # and all that they are made of
from gralora_kernels.cpu.variant import variant


def test_no_two_compiled_functions_have_one_name() -> None:
    functions = {id(one): one.py_func for one in gc.get_objects() if issubclass(type(one), Dispatcher)}
    own = [function for function in functions.values() if function.__module__.startswith("gralora_kernels.cpu")]

    names = Counter((function.__module__, function.__qualname__) for function in own)

    assert len(own) > 40
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_a_variant_is_named_by_what_it_was_made_with() -> None:
    def multiply() -> None: ...

    named = variant(2, "float16")(multiply)

    assert (named.__name__, named.__qualname__.rpartition(".")[2]) == ("multiply_2_float16",) * 2
