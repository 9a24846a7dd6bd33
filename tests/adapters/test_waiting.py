"""Who gets room in a full pool, and when: in order of arrival, without starving anybody, whatever the threads do."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from adapters.harness import (
    UNIT_BYTES,
    WAIT_S,
    Gate,
    is_pending,
    lease,
    managing,
    quiesce,
    use,
    weights,
    write_units,
)
from support.checkpoints import MODULES

from gralora_runtime.adapters.answers import Answers
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter, load
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.residency import mover
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.adapters.residency.mover import NUM_READERS, READ_AHEAD
from gralora_runtime.adapters.residency.pace import Pace
from gralora_runtime.adapters.residency.pool import AdapterPool, Resident
from gralora_runtime.adapters.residency.transfer import transfer_to
from gralora_runtime.errors import (
    AdapterBusyError,
    AdapterCapacityError,
    AdapterNotFoundError,
    DrainingError,
    MemoryShortageError,
)


def acquire_and_settle(manager: AdapterManager, name: str) -> Future[AdapterLease]:
    """Acquire, and let the threads do all they can."""
    acquired = manager.acquire(name)
    quiesce(manager)
    return acquired


def test_room_is_given_in_order_of_arrival(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b", "c", "d"])
    with managing(tmp_path, units=2) as manager:
        held = [lease(manager, "a"), lease(manager, "b")]
        c, d = acquire_and_settle(manager, "c"), acquire_and_settle(manager, "d")
        assert not c.done()
        assert AdapterState.LOADING is manager.get("c").state
        manager.release(held[1])

        assert c.result(WAIT_S).name == "c"
        assert is_pending(manager, d)
        manager.release(held[0])
        assert d.result(WAIT_S).name == "d"
        manager.release(c.result())
        manager.release(d.result())


@pytest.mark.parametrize("steps_run", [True, False])
def test_nobody_waits_for_the_placer_s_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_run: bool) -> None:
    """It prepares memory at leisure, and comes at once when it is wanted."""
    monkeypatch.setattr(mover, "BUSY_REST_S" if steps_run else "REST_S", 100 * WAIT_S)
    touched: list[object] = []
    monkeypatch.setattr(AdapterPool, "touch_ahead", touched.append)
    write_units(tmp_path, ["a", "b"])
    busy = transfer_to(torch.device("cpu"), pace=Pace(steps_run=lambda: steps_run))
    with managing(tmp_path, transfer=busy) as manager:
        for name in "ab":
            use(manager, name)

        assert manager.stats().placements == 2
    assert touched == []


def test_a_start_waits_for_the_first_adapters_memory(tmp_path: Path) -> None:
    write_units(tmp_path, ["a"])
    with managing(tmp_path) as manager:
        manager.await_memory(WAIT_S)
        assert not manager.pool.touch_ahead()


def test_a_start_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(AdapterPool, "touch_ahead", lambda _pool: not go_on.wait(WAIT_S))
    with managing(tmp_path) as manager:
        manager.await_memory(0.01)
        assert not go_on.is_set()
        go_on.set()


def test_who_gives_up_makes_way(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "c", "d"])
    with managing(tmp_path, units=1) as manager:
        held = lease(manager, "a")
        c, d = acquire_and_settle(manager, "c"), acquire_and_settle(manager, "d")
        assert c.cancel()
        manager.release(held)

        assert d.result(WAIT_S).name == "d"
        assert AdapterState.HOST is manager.get("c").state
        manager.release(d.result())


def test_slots_are_waited_for_like_bytes(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b"])
    with managing(tmp_path, units=4, slots=1) as manager:
        held = lease(manager, "a")
        b = manager.acquire("b")
        assert is_pending(manager, b)
        manager.release(held)

        assert b.result(WAIT_S).slot == 0
        manager.release(b.result())


def test_a_large_adapter_is_not_starved_by_busy_small_ones(tmp_path: Path) -> None:
    """The small ones are never idle: each takes its next lease before it gives back the last one."""
    write_units(tmp_path, ["a", "b", "c", "d"])
    write_units(tmp_path, ["big"], units=4)
    with managing(tmp_path, units=4) as manager:
        held = {name: lease(manager, name) for name in "abcd"}
        big = acquire_and_settle(manager, "big")
        waiting = []
        for name in "abcd":
            following = manager.acquire(name)
            manager.release(held[name])
            waiting.append(following)

        assert big.result(WAIT_S).name == "big"
        assert not any(future.done() for future in waiting)
        manager.release(big.result())
        for future in waiting:
            manager.release(future.result(WAIT_S))


def test_only_those_in_the_way_are_held_back(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b", "c", "d"])
    write_units(tmp_path, ["big"], units=2)
    with managing(tmp_path, units=4) as manager:
        held = {name: lease(manager, name) for name in "abcd"}
        big = acquire_and_settle(manager, "big")
        following = {name: manager.acquire(name) for name in "abcd"}

        assert [name for name in "abcd" if following[name].done()] == ["c", "d"]  # a and b were used least recently
        for name in "abcd":
            manager.release(held[name])
        manager.release(big.result(WAIT_S))
        for future in following.values():
            manager.release(future.result(WAIT_S))


def test_a_small_adapter_uses_other_room_while_a_large_one_waits_for_its_own(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b", "c", "d", "e"])
    write_units(tmp_path, ["big"], units=2)
    with managing(tmp_path, units=4) as manager:
        held = {name: lease(manager, name) for name in "abcd"}
        manager.release(held["b"])
        big = acquire_and_settle(manager, "big")  # waits for a and b, of which b is idle
        e = acquire_and_settle(manager, "e")
        assert not e.done(), "it took the room that is kept"
        manager.release(held["d"])

        assert held["d"].slot == e.result(WAIT_S).slot
        assert not big.done()
        manager.release(held["a"])
        assert big.result(WAIT_S).name == "big"
        for one in (held["c"], e.result(), big.result()):
            manager.release(one)


def test_free_room_that_is_kept_for_a_large_adapter_is_not_given_to_a_small_one(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b", "c", "e"])
    write_units(tmp_path, ["big"], units=2)
    with managing(tmp_path, units=4) as manager:
        held = [lease(manager, name) for name in "abcab"]  # c was used least recently, beside it is free room
        big = acquire_and_settle(manager, "big")
        e = acquire_and_settle(manager, "e")
        assert not e.done()
        manager.release(held.pop(2))

        assert big.result(WAIT_S).name == "big"
        for one in (*held, big.result()):
            manager.release(one)
        manager.release(e.result(WAIT_S))


def test_content_that_is_held_back_is_not_brought_in_a_second_time_by_another_name(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b"])
    write_units(tmp_path, ["big"], units=3)
    shutil.copytree(tmp_path / "b", tmp_path / "copy")
    with managing(tmp_path, units=4) as manager:
        use(manager, "a")
        held = lease(manager, "b")
        big = acquire_and_settle(manager, "big")  # waits for b
        copy = acquire_and_settle(manager, "copy")  # could have the room of a, which is idle
        assert not copy.done()
        assert manager.get("copy").digest == held.digest
        manager.release(held)
        manager.release(big.result(WAIT_S))

        assert copy.result(WAIT_S).digest == held.digest
        manager.release(copy.result())


def test_what_is_unloaded_while_it_moves_in_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_units(tmp_path, ["a"])
    with managing(tmp_path) as manager:
        begun, go_on, fill = threading.Event(), threading.Event(), manager.pool.fill

        def slow_fill(resident: Resident, adapter: LoadedAdapter) -> None:
            begun.set()
            assert go_on.wait(WAIT_S)
            fill(resident, adapter)

        monkeypatch.setattr(manager.pool, "fill", slow_fill)
        a = manager.acquire("a")
        assert begun.wait(WAIT_S)
        assert a.cancel()
        manager.unload("a")
        go_on.set()
        quiesce(manager)

        assert manager.stats().pool_bytes_used == 0
        assert not manager.pool.arena.any()


def test_a_lease_whose_future_was_cancelled_meanwhile_is_taken_back() -> None:
    """Between the decision under the lock and the delivery outside of it the waiter may give up."""
    taken: list[AdapterLease] = []
    answers, kept, cancelled = Answers(taken.append), Future[AdapterLease](), Future[AdapterLease]()
    leases = [AdapterLease(f"{i}", "d", slot=i, generation=1, width=1, serial=i) for i in range(2)]
    answers.result(kept, leases[0])
    answers.result(cancelled, leases[1])
    answers.error(cancelled, DrainingError())
    assert cancelled.cancel()
    answers.deliver()

    assert kept.result() is leases[0]
    assert taken == [leases[1]]


def test_when_the_large_one_gives_up_the_others_are_served_where_they_are(tmp_path: Path, gate: Gate) -> None:
    write_units(tmp_path, ["a"])
    write_units(tmp_path, ["big"], units=2)
    with managing(tmp_path, units=2) as manager:
        held = lease(manager, "a")
        big = acquire_and_settle(manager, "big")
        again = acquire_and_settle(manager, "a")
        assert not again.done()
        assert big.cancel()

        assert (held.slot, held.generation) == (again.result(WAIT_S).slot, again.result().generation)
        assert gate.names == ["a", "big"]
        manager.release(held)
        manager.release(again.result())


def test_who_was_held_back_comes_back_without_the_disk(tmp_path: Path, gate: Gate) -> None:
    """Even without a host cache: the weights go from the pool to the one who waits for them."""
    write_units(tmp_path, ["a"])
    write_units(tmp_path, ["big"], units=2)
    with managing(tmp_path, units=2, host_units=0) as manager:
        held = lease(manager, "a")
        blob = weights(manager, held)
        big = acquire_and_settle(manager, "big")
        again = acquire_and_settle(manager, "a")
        manager.release(held)
        manager.release(big.result(WAIT_S))

        assert torch.equal(blob, weights(manager, again.result(WAIT_S)))
        assert gate.names == ["a", "big"]
        manager.release(again.result())


def test_a_pin_that_leaves_no_room_sends_the_waiting_away(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b"])
    with managing(tmp_path, units=1) as manager:
        held = lease(manager, "a")
        b = acquire_and_settle(manager, "b")
        manager.pin("a", True)

        with pytest.raises(AdapterCapacityError):
            b.result(WAIT_S)
        assert AdapterState.HOST is manager.get("b").state
        manager.release(held)


def test_a_pin_takes_an_adapter_out_of_the_way_of_a_large_one(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b", "c"])
    write_units(tmp_path, ["big"], units=2)
    with managing(tmp_path, units=3) as manager:
        held = {name: lease(manager, name) for name in "abc"}
        big = acquire_and_settle(manager, "big")
        manager.pin("a", True)
        quiesce(manager)
        again = manager.acquire("a")
        assert again.done()
        manager.release(held["b"])
        manager.release(held["c"])

        assert big.result(WAIT_S).name == "big"
        assert AdapterState.RESIDENT is manager.get("a").state
        for one in (held["a"], again.result(), big.result()):
            manager.release(one)


class SlowFill:
    """Holds back the next write of weights into the pool until it is let go."""

    def __init__(self, manager: AdapterManager, patch: pytest.MonkeyPatch) -> None:
        self._begun, self._go_on, self._fill = threading.Event(), threading.Event(), manager.pool.fill
        patch.setattr(manager.pool, "fill", self._slow)

    def wait_for_it(self) -> None:
        assert self._begun.wait(WAIT_S)

    def let_go(self) -> None:
        self._go_on.set()

    def _slow(self, resident: Resident, adapter: LoadedAdapter) -> None:
        self._begun.set()
        assert self._go_on.wait(WAIT_S)
        self._fill(resident, adapter)


@contextmanager
def with_b_in_the_middle(root: Path, pinned: bool = True) -> Iterator[AdapterManager]:
    """a, b, c and d side by side and idle: for `big`, which takes three units, b is in the way."""
    write_units(root, ["a", "b", "c", "d"])
    write_units(root, ["big"], units=3)
    with managing(root, units=4) as manager:
        for name in "abcd":
            use(manager, name)
        manager.pin("b", pinned)
        yield manager


def test_an_adapter_for_which_a_pinned_one_has_to_move_gets_in(tmp_path: Path) -> None:
    """It used to be refused, although its bytes are free."""
    with with_b_in_the_middle(tmp_path) as manager:
        before = use(manager, "b")
        blob = manager.pool.read(manager.pool.find(before.digest)).blob

        big = lease(manager, "big")
        after = lease(manager, "b")

        assert before.slot == after.slot
        assert before.generation < after.generation == manager.pool.generation(after.slot)
        assert torch.equal(blob, weights(manager, after))
        expected = load("big", tmp_path / "big", MODULES, torch.float32, max_width=256)
        assert torch.equal(expected.blob, weights(manager, big))
        assert manager.stats().moves == 1
        manager.release(big)
        manager.release(after)


def test_nobody_is_moved_where_somebody_idle_makes_room(tmp_path: Path) -> None:
    with with_b_in_the_middle(tmp_path, pinned=False) as manager:
        use(manager, "big")

        assert manager.stats().moves == 0


def test_a_leased_adapter_is_waited_for_and_then_moved(tmp_path: Path) -> None:
    with with_b_in_the_middle(tmp_path) as manager:
        held = lease(manager, "b")
        blob = weights(manager, held).clone()
        big = acquire_and_settle(manager, "big")
        again = acquire_and_settle(manager, "b")
        assert not big.done()
        assert not again.done(), "it would be in the way for ever"
        assert torch.equal(blob, weights(manager, held))
        manager.release(held)

        assert big.result(WAIT_S).name == "big"
        assert again.result(WAIT_S).generation > held.generation
        assert torch.equal(blob, weights(manager, again.result()))
        manager.release(big.result())
        manager.release(again.result())


def test_when_the_large_one_gives_up_a_pinned_one_stays_where_it_is(tmp_path: Path) -> None:
    with with_b_in_the_middle(tmp_path) as manager:
        held = lease(manager, "b")
        big = acquire_and_settle(manager, "big")
        again = acquire_and_settle(manager, "b")
        assert big.cancel()

        assert held.generation == again.result(WAIT_S).generation
        assert manager.stats().moves == 0
        manager.release(held)
        manager.release(again.result())


def test_an_unpinned_adapter_that_was_to_move_leaves_instead(tmp_path: Path) -> None:
    with with_b_in_the_middle(tmp_path) as manager:
        held = lease(manager, "b")
        big = acquire_and_settle(manager, "big")
        manager.pin("b", False)
        quiesce(manager)
        manager.release(held)

        assert big.result(WAIT_S).name == "big"
        manager.release(big.result())


def test_requests_for_an_adapter_that_is_being_moved_get_it_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    with with_b_in_the_middle(tmp_path) as manager:
        slow = SlowFill(manager, monkeypatch)
        big = manager.acquire("big")
        slow.wait_for_it()
        b = manager.acquire("b")
        assert not b.done()
        assert AdapterState.LOADING is manager.get("b").state
        manager.check_integrity()
        slow.let_go()

        assert b.result(WAIT_S).generation == manager.pool.generation(b.result().slot)
        assert gate.names == ["a", "b", "c", "d", "big"]
        assert AdapterState.RESIDENT is manager.get("b").state
        manager.release(big.result(WAIT_S))
        manager.release(b.result())


def test_what_is_unloaded_while_it_is_moved_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with with_b_in_the_middle(tmp_path) as manager:
        slow = SlowFill(manager, monkeypatch)
        big = manager.acquire("big")
        slow.wait_for_it()
        manager.unload("b")
        slow.let_go()
        manager.release(big.result(WAIT_S))
        manager.unload("big")
        quiesce(manager)

        assert manager.stats().slots_used == 0
        assert not manager.pool.arena.any()


def test_what_waits_for_a_move_does_not_wait_for_what_was_unloaded(tmp_path: Path) -> None:
    """The moves that were planned are of an arena that is no more."""
    write_units(tmp_path, ["a", "b", "c", "d"])
    write_units(tmp_path, ["big"], units=2)
    with managing(tmp_path, units=4) as manager:
        for name in "abcd":
            manager.load(name, pin=True).result(WAIT_S)
        held = lease(manager, "c")
        manager.pin("a", False)
        manager.pin("c", False)
        big = acquire_and_settle(manager, "big")
        manager.unload("b")
        quiesce(manager)

        assert big.result(WAIT_S).name == "big"
        manager.release(held)
        manager.release(big.result())


# A move that fails.


class FailOnce:
    """The next call of one of the pool's methods ends with an error, before or behind its work."""

    def __init__(self, manager: AdapterManager, patch: pytest.MonkeyPatch, method: str, *, behind: bool) -> None:
        self._behind = behind
        self._call = getattr(manager.pool, method)
        self._failed = False
        patch.setattr(manager.pool, method, self._fail)

    def _fail(self, *args: object) -> object:
        failing, self._failed = not self._failed, True
        result = self._call(*args) if self._behind or not failing else None
        if failing:
            raise MemoryError
        return result


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("method", ["read", "clear", "fill"])
def test_nobody_is_lost_when_an_eviction_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, behind: bool
) -> None:
    """It left room that was taken for ever, by adapters that were leaving for ever."""
    write_units(tmp_path, ["a", "b"])
    with managing(tmp_path, units=1) as manager:
        blobs = {name: load(name, tmp_path / name, MODULES, torch.float32, max_width=256).blob for name in "ab"}
        use(manager, "a")
        FailOnce(manager, monkeypatch, method, behind=behind)
        with pytest.raises((MemoryError, MemoryShortageError)):
            lease(manager, "b")
        quiesce(manager)
        for name in "abab":
            held = lease(manager, name)
            assert torch.equal(blobs[name], weights(manager, held))
            manager.release(held)


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("method", ["read", "clear", "fill"])
def test_nobody_is_lost_when_a_change_of_places_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, behind: bool
) -> None:
    with with_b_in_the_middle(tmp_path) as manager:
        FailOnce(manager, monkeypatch, method, behind=behind)
        with pytest.raises(MemoryError):
            lease(manager, "big")
        quiesce(manager)
        for name in ("a", "b", "c", "d", "big", "b"):
            held = lease(manager, name)
            expected = load(name, tmp_path / name, MODULES, torch.float32, max_width=256).blob
            assert torch.equal(expected, weights(manager, held))
            manager.release(held)
        assert manager.stats().slots_used == 2


@pytest.mark.parametrize("unloads", [True, False])
def test_room_that_cannot_be_zeroed_is_given_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unloads: bool
) -> None:
    write_units(tmp_path, ["a", "b", "c"])
    with managing(tmp_path, units=2) as manager:
        use(manager, "a")
        use(manager, "b")
        monkeypatch.setattr(manager.pool, "clear", lambda _: 1 / 0)
        if unloads:
            with pytest.raises(ZeroDivisionError):
                manager.unload("a")
        else:
            with pytest.raises(ZeroDivisionError):
                lease(manager, "c")
        quiesce(manager)
        monkeypatch.undo()
        for name in ("b", "c", "b"):
            use(manager, name)
        assert manager.stats().slots_used == 2


def test_little_is_read_ahead_of_the_room(tmp_path: Path, gate: Gate) -> None:
    """A thousand waiting adapters must not fill the host's memory with weights."""
    names = [f"n{i}" for i in range(READ_AHEAD + 10)]
    write_units(tmp_path, ["a", *names])
    with managing(tmp_path, units=1, host_units=0) as manager:
        held = lease(manager, "a")
        waiting = [manager.acquire(name) for name in names]
        quiesce(manager)
        assert len(gate.names) == 1 + READ_AHEAD
        for future in waiting:
            future.add_done_callback(lambda answered: manager.release(answered.result()))
        manager.release(held)

        assert set(names) == {future.result(WAIT_S).name for future in waiting}
        assert 1 + len(names) == len(gate.names)


@pytest.mark.parametrize(("budget_units", "read"), [(0.5, 1), (1, 1), (3.5, 3), (100, 8)])
def test_what_is_read_ahead_is_bounded_by_bytes_too(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, budget_units: float, read: int
) -> None:
    """Sixteen large adapters would be gigabytes. One is read however large it is."""
    monkeypatch.setattr(mover, "READ_AHEAD_BYTES", int(budget_units * UNIT_BYTES))
    names = [f"n{i}" for i in range(8)]
    write_units(tmp_path, ["a", *names])
    with managing(tmp_path, units=1, host_units=0) as manager:
        held = lease(manager, "a")
        waiting = [manager.acquire(name) for name in names]
        quiesce(manager)
        assert sorted(gate.names) == ["a", *names[:read]], "they are read while the pool is full, and no more"
        for future in waiting:
            future.add_done_callback(lambda answered: manager.release(answered.result()))
        manager.release(held)

        assert set(names) == {future.result(WAIT_S).name for future in waiting}


def test_of_adapters_of_unknown_size_as_many_are_read_at_once_as_there_are_readers(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover, "READ_AHEAD_BYTES", int(READ_AHEAD * 1.5 * UNIT_BYTES))
    names = [f"n{i}" for i in range(READ_AHEAD + 4)]
    write_units(tmp_path, ["a", *names])
    with managing(tmp_path, units=1, host_units=0) as manager:
        held = lease(manager, "a")
        for name in names:
            manager._store.get(name).current.summary = None
        gate.shut()
        waiting = [manager.acquire(name) for name in names]
        assert len(manager._mover._reading) == NUM_READERS
        gate.open()
        for future in waiting:
            future.add_done_callback(lambda answered: manager.release(answered.result()))
        manager.release(held)

        assert set(names) == {future.result(WAIT_S).name for future in waiting}
        assert not manager._mover._reading


@pytest.mark.parametrize("host_units", [0, 3, 50])
def test_a_storm_of_threads_gets_the_right_weights_and_leaves_the_books_in_order(
    tmp_path: Path, host_units: int
) -> None:
    """Requests that hold, cancel and abandon; operators who load, unload and pin; and little room."""
    small, large = [f"s{i}" for i in range(8)], [f"l{i}" for i in range(4)]
    write_units(tmp_path, small)
    write_units(tmp_path, large, units=3)
    names = [*small, *large]
    blobs = {n: load(n, tmp_path / n, MODULES, torch.float32, max_width=256).blob for n in names}
    with managing(tmp_path, units=5, slots=4, host_units=host_units) as manager, ThreadPoolExecutor(9) as threads:

        def request(seed: int) -> int:
            rng, served = random.Random(seed), 0
            for _ in range(60):
                name = rng.choice(names)
                acquired = manager.acquire(name)
                if rng.random() < 0.2:
                    manager.abandon(acquired)
                    continue
                try:
                    held = acquired.result(WAIT_S)
                except (AdapterCapacityError, AdapterNotFoundError):  # too much is pinned, or it is being loaded anew
                    continue
                assert torch.equal(blobs[name], weights(manager, held)), "another adapter's weights"
                manager.release(held)
                served += 1
            return served

        def operate() -> int:
            rng = random.Random(99)
            for _ in range(60):
                name = rng.choice(names)
                try:
                    if rng.random() < 0.5:
                        manager.pin(name, rng.random() < 0.3)
                    else:
                        manager.unload(name)
                        manager.load(name).result(WAIT_S)
                except (AdapterBusyError, AdapterCapacityError):
                    pass
                manager.check_integrity()
                if manager._store.find(name) is None:  # a new name that found no room is not kept
                    name_back(manager, name)
            return 1

        done = [threads.submit(request, seed) for seed in range(8)] + [threads.submit(operate)]
        served = [future.result(6 * WAIT_S) for future in done]
        quiesce(manager)

        assert all(served)
        assert 0 == manager.stats().leases == manager.stats().waiting
        assert len(manager._mover._queue) == 0
        for name in names:
            manager.unload(name)
        assert not manager.pool.arena.any()
        assert 0 == manager.stats().pool_bytes_used == manager.stats().host_bytes_used


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_in_which_pinned_adapters_change_places_gives_everybody_their_own(tmp_path: Path, seed: int) -> None:
    """A leased adapter stays where it is; who waits beside pins gets in; and the books are right all the while."""
    small, large = [f"s{i}" for i in range(8)], [f"l{i}" for i in range(3)]
    write_units(tmp_path, small)
    write_units(tmp_path, large, units=3)
    names = [*small, *large]
    blobs = {n: load(n, tmp_path / n, MODULES, torch.float32, max_width=256).blob for n in names}
    with managing(tmp_path, units=7, slots=6, host_units=20) as manager, ThreadPoolExecutor(7) as threads:

        def request(i: int) -> None:
            rng = random.Random(100 * seed + i)
            for _ in range(60):
                name = rng.choice(names)
                held = lease(manager, name)
                place = manager.pool.find(held.digest)
                assert place is not None
                offset = place.offset
                for _ in range(3):
                    assert torch.equal(blobs[name], weights(manager, held)), "another adapter's weights"
                    assert place.offset == offset
                manager.release(held)

        def operate() -> None:
            """Never more pins than leave room for a large one, so nobody may be refused."""
            rng, pinned = random.Random(seed), []
            for _ in range(150):
                if len(pinned) == 4:
                    manager.pin(pinned.pop(rng.randrange(4)), False)
                name = rng.choice([name for name in small if name not in pinned])
                pinned.append(name)
                manager.load(name, pin=True).result(WAIT_S)
                manager.check_integrity()
            for name in pinned:
                manager.pin(name, False)

        done = [threads.submit(request, i) for i in range(6)] + [threads.submit(operate)]
        for future in done:
            future.result(6 * WAIT_S)
        quiesce(manager)

        assert manager.stats().moves > 0
        assert 0 == manager.stats().leases == manager.stats().waiting == len(manager._mover._queue)
        for name in names:
            manager.unload(name)
        assert not manager.pool.arena.any()


def name_back(manager: AdapterManager, name: str) -> None:
    """Load until the pins of others leave room."""
    for other in manager.list():
        manager.pin(other.name, False)
    manager.load(name).result(WAIT_S)


def test_many_threads_on_one_cold_adapter_read_it_once(tmp_path: Path, gate: Gate) -> None:
    write_units(tmp_path, ["a"])
    with managing(tmp_path) as manager, ThreadPoolExecutor(8) as threads:
        start = threading.Barrier(8)

        def request(_: int) -> AdapterLease:
            start.wait(WAIT_S)
            return use(manager, "a")

        leases = list(threads.map(request, range(8)))

        assert gate.names == ["a"]
        assert len({held.generation for held in leases}) == 1
