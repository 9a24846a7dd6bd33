"""Tenants take turns: where things are counted, where adapters are read and placed, and where trials begin."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest
from adapters.harness import WAIT_S, Gate, lease, managing, quiesce, write_units
from adapters.test_admission import RIGHT, trying, write_golden
from adapters.test_versions import write_version
from hypothesis import given
from hypothesis import strategies as st

from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.adapters.residency.mover import NUM_READERS, READ_AHEAD
from gralora_runtime.adapters.turns import Turns


def taken(turns: Turns[str], number: int) -> list[str]:
    found = []
    for _ in range(number):
        item = next(iter(turns))
        turns.take(item)
        found.append(item)
    return found


def crowd(turns: Turns[str], tenant: str, number: int, weight: float = 1.0) -> None:
    for at in range(number):
        turns.add(f"{tenant}{at}", tenant, weight)


def test_one_tenant_s_come_in_order_of_arrival() -> None:
    turns: Turns[str] = Turns()
    crowd(turns, "a", 5)

    assert taken(turns, 5) == ["a0", "a1", "a2", "a3", "a4"]
    assert len(turns) == 0


def test_who_comes_anew_is_next() -> None:
    turns: Turns[str] = Turns()
    crowd(turns, "a", 500)
    taken(turns, 3)
    turns.add("b0", "b")

    assert taken(turns, 2) == ["b0", "a3"]


def test_who_asks_again_and_again_gets_no_more_than_its_turns() -> None:
    turns: Turns[str] = Turns()
    crowd(turns, "a", 500)
    found: list[str] = []
    while len(found) < 20:
        if "b" not in turns.tenants:
            turns.add(f"b{len(found)}", "b")
        found += taken(turns, 1)

    counts = Counter(item[0] for item in found)
    assert abs(counts["a"] - counts["b"]) <= 1


def test_a_tenant_of_twice_the_weight_has_twice_the_turns() -> None:
    turns: Turns[str] = Turns()
    crowd(turns, "a", 100, weight=2.0)
    crowd(turns, "b", 100)

    assert Counter(item[0] for item in taken(turns, 60)) == {"a": 40, "b": 20}


def test_what_two_wait_for_comes_when_it_is_the_turn_of_either() -> None:
    turns: Turns[str] = Turns()
    crowd(turns, "a", 500)
    taken(turns, 1)
    turns.add("a499", "b")

    assert taken(turns, 2) == ["a499", "a1"]
    assert "a499" not in turns


@given(st.lists(st.one_of(st.sampled_from("abcd"), st.none()), max_size=80))
def test_nobody_who_waits_falls_behind_by_more_than_a_turn(arrivals: list[str | None]) -> None:
    """None: the next is taken. While two wait, neither is taken twice more than the other."""
    turns: Turns[str] = Turns()
    since: dict[str, Counter[str]] = {}  # by a tenant that waits: whose turn it was since it began to
    for at, tenant in enumerate(arrivals):
        if tenant is not None:
            if tenant not in turns.tenants:
                since[tenant] = Counter()
            turns.add(f"{tenant}{at}", tenant)
        elif len(turns):
            now = taken(turns, 1)[0][0]
            for counts in since.values():
                counts[now] += 1
            since = {who: counts for who, counts in since.items() if who in turns.tenants}
            for who, counts in since.items():
                assert all(counts[other] <= counts[who] + 2 for other in counts)


def acquire_all(manager: AdapterManager, names: list[str], tenant: str) -> list[Future[AdapterLease]]:
    return [manager.acquire(name, tenant=tenant) for name in names]


def release_all(manager: AdapterManager, waiting: list[Future[AdapterLease]]) -> None:
    for future in waiting:
        future.add_done_callback(lambda answered: manager.release(answered.result()))
    for future in waiting:
        future.result(WAIT_S)


def test_a_light_tenant_s_adapter_is_read_after_those_that_are_being_read(tmp_path: Path, gate: Gate) -> None:
    heavy = [f"h{at:03}" for at in range(100)]
    write_units(tmp_path, [*heavy, "light"])
    with managing(tmp_path, units=2, host_units=0) as manager:
        gate.shut()
        waiting = acquire_all(manager, heavy, "heavy")
        for _ in range(NUM_READERS):
            gate.wait_for_a_read()
        waiting += acquire_all(manager, ["light"], "light")
        gate.open()
        release_all(manager, waiting)

    assert gate.names.index("light") < 10  # threads begin in any order: the next ones, and hardly more


def test_what_another_tenant_has_read_ahead_is_not_in_the_way_of_a_light_one(tmp_path: Path, gate: Gate) -> None:
    heavy = [f"h{at:03}" for at in range(READ_AHEAD + 10)]
    write_units(tmp_path, ["a", *heavy, "light"])
    with managing(tmp_path, units=1, host_units=0) as manager:
        held = lease(manager, "a")
        waiting = acquire_all(manager, heavy, "heavy")
        quiesce(manager)
        light = manager.acquire("light", tenant="light")
        quiesce(manager)
        assert gate.names[-1] == "light"
        placed: list[str] = []
        for future in (*waiting, light):
            future.add_done_callback(lambda answered: placed.append(answered.result().name))
        manager.release(held)
        release_all(manager, [*waiting, light])

    assert placed.index("light") <= 1


@pytest.mark.parametrize("asks", ["light's own", "what another tenant waits for, too"])
def test_a_light_tenant_s_trial_comes_after_the_one_that_runs(tmp_path: Path, asks: str) -> None:
    heavy = [f"h{at}" for at in range(7)]
    for seed, name in enumerate([*heavy, "light"]):
        (tmp_path / name).mkdir(parents=True)
        write_golden(tmp_path, name, RIGHT)
        write_version(tmp_path, name, seed)
    wanted = "light" if asks == "light's own" else heavy[-1]
    with trying(tmp_path) as (manager, engine):
        engine.holds = True
        waiting = acquire_all(manager, heavy, "heavy")
        quiesce(manager)
        waiting += acquire_all(manager, [wanted], "light")
        quiesce(manager)
        engine.let_go()
        release_all(manager, waiting)

    assert [label for label, _ in engine.asked][1] == f"{wanted}@1"
