"""How much of the pool one owner's adapters take: its own make room for it, it waits for its own, and nobody else does.

An adapter's owner is the first letter of its name.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import as_completed
from contextlib import contextmanager
from pathlib import Path

import pytest
from adapters.harness import UNIT_BYTES, WAIT_S, is_pending, lease, managing, quiesce, use, write_units

from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.residency.mover import READ_AHEAD
from gralora_runtime.adapters.residency.share import PoolShare, ShareOf
from gralora_runtime.errors import GraloraError, QuotaExceededError

RESIDENT = AdapterState.RESIDENT


def shares(**units: float) -> ShareOf:
    """By owner, in units of the pool."""

    def share_of(name: str) -> PoolShare | None:
        owner = name[0]
        if owner not in units:
            return None
        max_bytes = int(units[owner] * UNIT_BYTES)

        def refusal(name: str, num_bytes: int) -> GraloraError:
            return QuotaExceededError(owner, "adapter_bytes", max_bytes, f"{num_bytes} bytes of adapter {name!r}")

        return PoolShare(owner=owner, max_bytes=max_bytes, refusal=refusal)

    return share_of


@contextmanager
def sharing(root: Path, limits: Mapping[str, float], **options: float) -> Iterator[AdapterManager]:
    with managing(root, **options) as manager:
        manager.limit_pool(shares(**limits))
        yield manager


def residents(manager: AdapterManager) -> str:
    quiesce(manager)
    return " ".join(sorted(info.name for info in manager.list() if info.state is RESIDENT))


def test_an_owner_with_its_share_makes_room_with_its_own_though_others_are_worth_less(tmp_path: Path) -> None:
    write_units(tmp_path, ["a1", "a2", "a3", "b1", "b2"])
    with sharing(tmp_path, {"a": 2}, units=4) as manager:
        for name in ("b1", "b2", "a1", "a2", "a3"):
            use(manager, name)

        assert residents(manager) == "a2 a3 b1 b2"
        use(manager, "a1")
        assert residents(manager) == "a1 a3 b1 b2"


def test_within_its_share_an_owner_takes_room_like_anybody(tmp_path: Path) -> None:
    write_units(tmp_path, ["a1", "a2", "b1", "b2"])
    with sharing(tmp_path, {"a": 2}, units=2) as manager:
        for name in ("b1", "b2", "a1", "a2"):
            use(manager, name)

        assert residents(manager) == "a1 a2"


def test_as_many_leave_as_a_larger_one_needs(tmp_path: Path) -> None:
    write_units(tmp_path, ["a1", "a2", "a3", "b1"])
    write_units(tmp_path, ["a-big"], units=2)
    with sharing(tmp_path, {"a": 3}, units=10) as manager:
        for name in ("a1", "b1", "a2", "a3", "a-big"):
            use(manager, name)

        assert residents(manager) == "a-big a3 b1"


def test_where_its_own_lie_apart_others_room_is_used_and_its_own_leave_all_the_same(tmp_path: Path) -> None:
    write_units(tmp_path, ["a1", "b1", "a2", "b2"])
    write_units(tmp_path, ["a-big"], units=2)
    with sharing(tmp_path, {"a": 2}, units=4) as manager:
        for name in ("a1", "b1", "a2", "b2"):  # side by side
            use(manager, name)
        use(manager, "a-big")

        assert residents(manager) in ("a-big b1", "a-big b2")


def test_an_owner_waits_for_its_own_while_others_pass(tmp_path: Path) -> None:
    write_units(tmp_path, ["a1", "a2", "b1", "b2"])
    with sharing(tmp_path, {"a": 1}, units=4) as manager:
        held = lease(manager, "a1")
        waiting = manager.acquire("a2")
        assert is_pending(manager, waiting)
        for name in ("b1", "b2"):
            use(manager, name)
        assert is_pending(manager, waiting)
        manager.release(held)

        manager.release(waiting.result(WAIT_S))
        assert residents(manager) == "a2 b1 b2"


def test_who_waits_for_its_own_is_not_starved_by_them(tmp_path: Path) -> None:
    """Each of them takes its next lease before it gives back the last one."""
    write_units(tmp_path, ["a1", "a2"])
    with sharing(tmp_path, {"a": 1}, units=4) as manager:
        held = lease(manager, "a1")
        waiting = manager.acquire("a2")
        assert is_pending(manager, waiting)
        following = manager.acquire("a1")
        assert is_pending(manager, following)
        manager.release(held)

        second = waiting.result(WAIT_S)
        assert is_pending(manager, following)
        manager.release(second)
        manager.release(following.result(WAIT_S))


def test_who_gives_up_waiting_lets_the_others_go_on(tmp_path: Path) -> None:
    write_units(tmp_path, ["a1", "a2"])
    with sharing(tmp_path, {"a": 1}, units=4) as manager:
        held = lease(manager, "a1")
        waiting = manager.acquire("a2")
        assert is_pending(manager, waiting)
        following = manager.acquire("a1")
        assert waiting.cancel()

        manager.release(following.result(WAIT_S))
        manager.release(held)


def test_many_that_wait_for_their_owners_share_keep_nobody_elses_from_being_read(tmp_path: Path) -> None:
    names = [f"a{index}" for index in range(2 * READ_AHEAD)]
    write_units(tmp_path, [*names, "b1", "b2"])
    with sharing(tmp_path, {"a": 1}, units=4, host_units=4 * READ_AHEAD) as manager:
        for name in names[: READ_AHEAD + 2]:  # these come from host memory
            use(manager, name)
        held = lease(manager, "a0")
        waiting = [manager.acquire(name) for name in names[1:]]
        quiesce(manager)
        for name in ("b1", "b2"):
            use(manager, name)
        manager.release(held)

        for acquired in as_completed(waiting, WAIT_S):
            manager.release(acquired.result())


@pytest.mark.parametrize("is_known", [False, True], ids=["unread", "read"])
def test_what_is_larger_than_the_share_is_refused(is_known: bool, tmp_path: Path) -> None:
    write_units(tmp_path, ["a1"])
    write_units(tmp_path, ["a-big", "b-big"], units=2)
    with sharing(tmp_path, {"a": 1}, units=4) as manager:
        for _ in range(1 + is_known):
            with pytest.raises(QuotaExceededError) as refused:
                lease(manager, "a-big")
        use(manager, "b-big")
        use(manager, "a1")
        state = manager.get("a-big").state

    assert (refused.value.tenant, refused.value.limit, refused.value.value) == ("a", "adapter_bytes", UNIT_BYTES)
    assert refused.value.asked == f"{2 * UNIT_BYTES} bytes of adapter 'a-big'"
    assert state is not AdapterState.FAILED  # it is no fault of its own


def test_pinned_ones_stay_and_what_does_not_fit_beside_them_is_refused(tmp_path: Path) -> None:
    write_units(tmp_path, ["a1", "a2", "a3"])
    with sharing(tmp_path, {"a": 2}, units=4) as manager:
        manager.load("a1", pin=True).result(WAIT_S)
        use(manager, "a2")
        use(manager, "a3")
        assert residents(manager) == "a1 a3"
        manager.pin("a3", True)
        with pytest.raises(QuotaExceededError):
            lease(manager, "a2")
        with pytest.raises(QuotaExceededError):
            manager.pin("a2", True)
        manager.pin("a1", False)

        use(manager, "a2")
        assert residents(manager) == "a2 a3"


def test_who_waits_for_one_that_is_pinned_meanwhile_is_refused(tmp_path: Path) -> None:
    write_units(tmp_path, ["a1", "a2"])
    with sharing(tmp_path, {"a": 1}, units=4) as manager:
        held = lease(manager, "a1")
        waiting = manager.acquire("a2")
        assert is_pending(manager, waiting)
        manager.pin("a1", True)

        with pytest.raises(QuotaExceededError):
            waiting.result(WAIT_S)
        manager.release(held)


def test_a_larger_share_lets_in_who_waits_and_a_smaller_one_drives_nobody_out(tmp_path: Path) -> None:
    write_units(tmp_path, ["a1", "a2", "a3"])
    with sharing(tmp_path, {"a": 1}, units=4) as manager:
        held = lease(manager, "a1")
        waiting = manager.acquire("a2")
        assert is_pending(manager, waiting)
        manager.limit_pool(shares(a=2))
        manager.release(waiting.result(WAIT_S))
        manager.limit_pool(shares(a=1))
        assert residents(manager) == "a1 a2"
        manager.release(held)

        use(manager, "a3")
        assert residents(manager) == "a3"


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_leaves_every_owner_within_its_share_and_nobody_waiting(seed: int, tmp_path: Path) -> None:
    names = [f"{owner}{index}" for owner in "abc" for index in range(4)]
    write_units(tmp_path, names)
    write_units(tmp_path, ["a-big", "c-big"], units=2)
    names += ["a-big", "c-big"]
    limits = {"a": 2, "b": 1}
    done = []

    def storm(number: int) -> None:
        chances = random.Random(f"{seed}-{number}")
        for _ in range(60):
            acquired = manager.acquire(chances.choice(names))
            if chances.random() < 0.2:
                manager.abandon(acquired)
                continue
            manager.release(acquired.result(WAIT_S))
        done.append(number)

    with sharing(tmp_path, limits, units=5, host_units=3) as manager:
        threads = [threading.Thread(target=storm, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        here = residents(manager).split()
        manager.check_integrity()
        draining = [resident for resident in manager.pool.residents() if resident.draining]

    assert sorted(done) == list(range(6))
    for owner, most in limits.items():
        assert sum(2 if name.endswith("big") else 1 for name in here if name[0] == owner) <= most
    assert draining == []
