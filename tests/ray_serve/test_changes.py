"""Changes that all replicas make: their order, who comes later, who goes, and who cannot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gralora_runtime.errors import AdapterBusyError, AdapterNotFoundError, GraloraError
from gralora_server.errors import ChangesLostError, ReplicasDifferError
from gralora_server.ray import follower as following_module
from gralora_server.ray.change import Change, Entry, Outcome
from gralora_server.ray.changes import GONE_S, Changes
from gralora_server.ray.follower import Follower
from gralora_server.tenants.caller import ANYBODY


def change(request: bytes = b"1", *, name: str = "poet", origin: str = "a", method: str = "LoadAdapter") -> Change:
    return Change(method=method, request=request, caller=ANYBODY, name=name, origin=origin)


class Replica:
    """Makes every change, unless it is told what to raise, or to wait."""

    def __init__(self, name: str, log: Changes) -> None:
        self.made: list[bytes] = []
        self.has_made = asyncio.Event()
        self.error: GraloraError | None = None
        self.holds: dict[str, asyncio.Event] = {}  # by an adapter's name
        self.follower = Follower(name, log, self._make)

    async def _make(self, change: Change) -> bytes:
        if change.name in self.holds:
            await self.holds[change.name].wait()
        if self.error is not None:
            raise self.error
        self.made.append(change.request)
        self.has_made.set()
        return self.follower.name.encode() + change.request


@asynccontextmanager
async def replicas(log: Changes, *names: str) -> AsyncIterator[list[Replica]]:
    async with AsyncExitStack() as stack:
        there = [Replica(name, log) for name in names]
        for replica in there:
            await stack.enter_async_context(replica.follower.following())
        yield there


async def test_who_asked_is_answered_when_all_have_made_it() -> None:
    log = Changes()
    async with replicas(log, "a", "b") as (a, b):
        b.holds["poet"] = asyncio.Event()
        asking = asyncio.create_task(a.follower.everywhere(change(b"x")))
        await a.has_made.wait()
        too_early = asking.done()
        b.holds["poet"].set()
        outcomes = await asking

    assert not too_early
    assert b.made == [b"x"]
    assert {name: outcome.response for name, outcome in outcomes.items()} == {"a": b"ax", "b": b"bx"}
    assert list(outcomes) == ["a", "b"]


async def test_the_answer_of_the_replica_that_was_asked_comes_first() -> None:
    log = Changes()
    async with replicas(log, "a", "b") as (_, b):
        outcomes = await b.follower.everywhere(change(origin="b"))

    assert list(outcomes) == ["b", "a"]


async def test_changes_of_one_name_are_made_everywhere_in_one_order() -> None:
    log, requests = Changes(), [b"%d" % number for number in range(20)]
    async with replicas(log, "a", "b", "c") as there:
        askers = [there[number % 3] for number in range(20)]
        await asyncio.gather(
            *(
                asker.follower.everywhere(change(request, origin=asker.follower.name))
                for asker, request in zip(askers, requests, strict=True)
            )
        )

    assert there[0].made == there[1].made == there[2].made
    assert sorted(there[0].made) == sorted(requests)


async def test_a_slow_change_holds_up_no_other_name() -> None:
    log = Changes()
    async with replicas(log, "a", "b") as (a, b):
        b.holds["slow"] = asyncio.Event()
        slow = asyncio.create_task(a.follower.everywhere(change(b"s", name="slow")))
        await a.follower.everywhere(change(b"f", name="fast"))
        is_waiting = not slow.done()
        b.holds["slow"].set()
        await slow

    assert is_waiting
    assert b.made == [b"f", b"s"]


async def test_who_comes_later_begins_with_all_that_was_made() -> None:
    log = Changes()
    async with replicas(log, "a") as (a,):
        for number in range(3):
            await a.follower.everywhere(change(b"%d" % number))
        late = Replica("late", log)
        async with late.follower.following():
            began_with = list(late.made)

    assert began_with == [b"0", b"1", b"2"]


async def test_what_nobody_could_make_is_the_askers_error_and_no_change_for_others() -> None:
    log = Changes()
    async with replicas(log, "a", "b") as (a, b):
        a.error = b.error = AdapterNotFoundError("poet")
        with pytest.raises(AdapterNotFoundError):
            await a.follower.everywhere(change())
        late = Replica("late", log)
        async with late.follower.following():
            began_with = list(late.made)

    assert began_with == []


async def test_a_change_that_some_could_not_make_is_told_so_and_stays() -> None:
    log = Changes()
    async with replicas(log, "a", "b") as (a, b):
        b.error = AdapterBusyError("poet", 2)
        with pytest.raises(ReplicasDifferError, match=r"1 of 2 replicas.*b: .*poet") as told:
            await a.follower.everywhere(change(method="PinAdapter"))
        late = Replica("late", log)
        async with late.follower.following():
            began_with = list(late.made)

    assert list(told.value.refusals) == ["b"]
    assert began_with == [b"1"]


async def test_unloading_what_another_replica_lacks_is_done() -> None:
    """Asked for a second time, after one replica was busy, it must not fail for ever."""
    log = Changes()
    async with replicas(log, "a", "b") as (a, b):
        a.error = AdapterNotFoundError("poet")
        outcomes = await a.follower.everywhere(change(method="UnloadAdapter"))

    assert list(outcomes) == ["b"]
    assert b.made == [b"1"]


async def test_an_unloaded_adapter_has_no_past() -> None:
    log = Changes()
    async with replicas(log, "a") as (a,):
        await a.follower.everywhere(change(b"load"))
        await a.follower.everywhere(change(b"other", name="bard"))
        await a.follower.everywhere(change(b"unload", method="UnloadAdapter"))
        await a.follower.everywhere(change(b"again"))
        late = Replica("late", log)
        async with late.follower.following():
            began_with = list(late.made)

    assert sorted(began_with) == [b"again", b"other", b"unload"]
    assert began_with.index(b"unload") < began_with.index(b"again")


async def test_what_is_not_kept_is_for_those_that_are_there() -> None:
    log = Changes()
    async with replicas(log, "a", "b") as (a, b):
        fleeting = Change(method="AbortRequest", request=b"r", caller=ANYBODY, name="", origin="a", is_kept=False)
        await a.follower.everywhere(fleeting)
        late = Replica("late", log)
        async with late.follower.following():
            pass

    assert (b.made, late.made) == ([b"r"], [])


async def test_a_replica_that_is_gone_is_not_waited_for() -> None:
    now_s = 0.0
    log = Changes(lambda: now_s)
    async with replicas(log, "a") as (a,):
        await log.news("dead", 0, serves=True, timeout_s=0)  # and never again
        now_s = GONE_S
        outcomes = await a.follower.everywhere(change())

    assert list(outcomes) == ["a"]


async def test_a_replica_that_leaves_meanwhile_is_not_waited_for() -> None:
    log = Changes()
    async with replicas(log, "a", "b") as (a, b):
        b.holds["poet"] = asyncio.Event()
        asking = asyncio.create_task(a.follower.everywhere(change()))
        await a.has_made.wait()
        await log.leave("b")
        outcomes = await asking

    assert list(outcomes) == ["a"]


async def test_a_client_that_leaves_changes_nothing() -> None:
    log = Changes()
    async with replicas(log, "a", "b") as (a, b):
        b.holds["poet"] = asyncio.Event()
        asking = asyncio.create_task(a.follower.everywhere(change()))
        await a.has_made.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        b.holds["poet"].set()
        await a.follower.everywhere(change(b"2"))

    assert b.made == [b"1", b"2"]


async def test_what_a_dead_replica_had_offered_is_forgotten_as_open_and_stays_a_change() -> None:
    now_s = 0.0
    log = Changes(lambda: now_s)
    await log.news("dead", 0, serves=True, timeout_s=0)
    number = await log.offer(change(b"its", origin="dead"))
    await log.report("dead", number, Outcome())
    now_s = 2 * GONE_S
    async with replicas(log, "a") as (a,):
        await a.follower.everywhere(change(b"mine"))

    assert a.made == [b"its", b"mine"]
    assert not log._open


class Breaking:
    """Changes that are lost and begin anew, as an actor that is started again."""

    def __init__(self) -> None:
        self.inner = Changes()
        self.is_away = False
        self.is_restored = asyncio.Event()

    def lose(self) -> None:
        self.inner, self.is_away = Changes(), True

    def __getattr__(self, name: str) -> object:
        async def call(*arguments: object, **options: object) -> object:
            inner = self.inner
            if self.is_away:
                raise ChangesLostError
            result = await getattr(inner, name)(*arguments, **options)
            if inner is not self.inner:
                raise ChangesLostError
            if name == "restore":
                self.is_restored.set()
            return result

        return call


async def test_changes_that_were_lost_come_back_from_the_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following_module, "POLL_S", 0.05)
    monkeypatch.setattr(following_module, "RETRY_S", 0.05)
    log = Breaking()
    a = Replica("a", log)
    async with a.follower.following():
        await a.follower.everywhere(change(b"before"))
        log.lose()
        with pytest.raises(ChangesLostError):
            await a.follower.everywhere(change(b"meanwhile"))
        log.is_away = False
        await log.is_restored.wait()
        await a.follower.everywhere(change(b"after"))
        late = Replica("late", log)
        async with late.follower.following():
            began_with = list(late.made)

    assert a.made == [b"before", b"after"]
    assert began_with == [b"before", b"after"]


@given(clocks=st.lists(st.integers(0, 5), min_size=2, max_size=10))
def test_numbers_grow_whatever_the_clock_says(clocks: list[int]) -> None:
    times = iter(clocks)
    log = Changes(clock_s=lambda: next(times))

    async def numbers() -> list[int]:
        return [await log.offer(change()) for _ in clocks]

    told = asyncio.run(numbers())

    assert told == sorted(set(told))


async def test_news_of_what_is_no_change_any_more_wake_nobody() -> None:
    log = Changes()
    await log.news("a", 0, serves=True, timeout_s=0)
    number = await log.offer(change())
    await log.report("a", number, Outcome(reason="NO", message="no"))
    await log.outcomes(number)

    assert await log.news("b", 0, serves=False, timeout_s=0.01) == []
    assert await log.news("b", number - 1, serves=False, timeout_s=0) == []


async def test_entries_travel_as_they_are() -> None:
    log = Changes()
    await log.restore([Entry(5, change(b"old"))])
    number = await log.offer(change(b"new"))

    assert number > 5
    assert [entry.change.request for entry in await log.news("a", 0, serves=False, timeout_s=0)] == [b"old", b"new"]


async def test_who_asks_first_after_the_list_was_lost_is_waited_for() -> None:
    """It used to be told at once that none of no replicas had made the change."""
    log = Changes()
    number = await log.offer(change(origin="a"))
    asking = asyncio.create_task(log.outcomes(number))
    await asyncio.sleep(0)
    too_early = asking.done()
    await log.report("a", number, Outcome(response=b"made"))

    assert not too_early
    assert await asking == {"a": Outcome(response=b"made")}
