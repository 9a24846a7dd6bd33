"""What a start waits for: all of it is loaded, and none of it compiled a second time."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager

from gralora_kernels.cpu import cache, families
from gralora_kernels.cpu.families import FAMILIES, load, load_families
from gralora_kernels.cpu.separate import Kernel, Separate, _called

COMPILED_AGAIN = """
import torch
from gralora_kernels.cpu.families import FAMILIES, load
print([name for name, kernels in FAMILIES.items() if load(kernels)])
"""


def told_of_start() -> dict[str, str]:
    """What is said of each family."""
    said: dict[str, str] = {}

    @contextmanager
    def stage(name):
        yield lambda words: said.update({name.removeprefix("Kernels: "): words})

    load_families(stage)
    return said


def test_a_later_process_finds_all_that_a_start_waits_for_in_the_cache() -> None:
    """It once compiled what places matrices at each start: Numba keeps no function that a factory made."""
    for kernels in FAMILIES.values():
        load(kernels)

    found = subprocess.check_output([sys.executable, "-c", COMPILED_AGAIN], text=True)

    assert found.strip() == "[]"


def test_families_that_another_process_did_not_get_done_are_loaded_here(monkeypatch) -> None:
    """It ends at once, or behind the first."""
    for kernels in FAMILIES.values():
        load(kernels)
    monkeypatch.setattr(families, "is_empty", lambda: True)
    first = families.BESIDE[0]
    for command, done in (("", []), (f"print({first!r})", [first])):
        monkeypatch.setattr(families, "LOAD_BESIDE", command)

        said = told_of_start()

        assert said == {name: "compiled beside the others" if name in done else "cached" for name in FAMILIES}


def test_each_family_calls_only_those_before_it() -> None:
    """Else it would be compiled with it, and both processes might do so."""
    family_of = {id(kernel): name for name, kernels in FAMILIES.items() for kernel in kernels}
    order = list(FAMILIES)

    for name, kernels in FAMILIES.items():
        for kernel in kernels:
            function = kernel._dispatcher.py_func if isinstance(kernel, Kernel) else kernel._function
            called = {family_of.get(id(one), name) for one in _called(function, set())}
            assert all(order.index(one) <= order.index(name) for one in called), (name, called)


def test_the_other_process_says_what_it_got_done_in_the_order_in_which_it_is_waited_for(capsys) -> None:
    families.load_beside()

    assert capsys.readouterr().out.splitlines() == [name for name in FAMILIES if name in families.BESIDE]


def test_a_cache_of_nothing_but_directories_is_empty(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(cache.numba.config, "CACHE_DIR", str(tmp_path))
    (tmp_path / "cpu_0").mkdir()
    assert cache.is_empty()

    (tmp_path / "cpu_0" / "linear.nbi").touch()
    assert not cache.is_empty()


def test_where_no_cache_can_be_written_no_process_is_started_to_fill_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(cache.numba.config, "CACHE_DIR", str(tmp_path / "not there"))

    assert not cache.is_empty()


def test_no_two_functions_have_one_symbol() -> None:
    symbols = Counter(
        one.symbol for one in {id(one): one for one in gc.get_objects() if type(one) is Separate}.values()
    )

    assert len(symbols) > 10
    assert {symbol: count for symbol, count in symbols.items() if count > 1} == {}
