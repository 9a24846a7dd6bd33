"""A replica's side of the changes that all make: it makes those of others, and has its own made by the others.

Changes of one name are made one after the other in their order, those of different names side by side. Knows neither
what a change is nor Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from gralora_server.errors import ChangesLostError, ReplicasDifferError
from gralora_server.explanation import explain
from gralora_server.ray.change import Change, Entry, Outcome, with_change

POLL_S = 3.0
RETRY_S = 1.0

# Not refusals, where somebody else has done it: the change has been made already.
MOOT = {"UnloadAdapter": "ADAPTER_NOT_FOUND"}

_log = logging.getLogger(__name__)

T = TypeVar("T")

Make = Callable[[Change], Awaitable[bytes]]  # the response's bytes; raises why it cannot be made


class Log(Protocol):
    """See `Changes`. Raises `ChangesLostError` where that is out of reach."""

    async def offer(self, change: Change) -> int: ...
    async def news(self, name: str, after: int, *, serves: bool, timeout_s: float) -> list[Entry]: ...
    async def report(self, name: str, number: int, outcome: Outcome) -> None: ...
    async def outcomes(self, number: int) -> dict[str, Outcome]: ...
    async def restore(self, entries: Iterable[Entry]) -> None: ...
    async def leave(self, name: str) -> None: ...


class Follower:
    """Follows while `following` lasts."""

    def __init__(self, name: str, log: Log, make: Make) -> None:
        self.name = name
        self._log = log
        self._make = make
        self._last = 0
        self._made: dict[int, Entry] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()  # the loop itself keeps none alive
        self._errors: dict[int, BaseException] = {}  # of changes that came from here, until who asked has them

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Begins with all that others have made. Raises `ChangesLostError`."""
        while entries := await self._log.news(self.name, self._last, serves=False, timeout_s=0):
            self._begin(entries)
            await asyncio.gather(*self._tasks)
        # From here on others wait for this one.
        self._begin(await self._log.news(self.name, self._last, serves=True, timeout_s=0))
        following = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
            with suppress(ChangesLostError):
                await self._log.leave(self.name)

    async def everywhere(self, change: Change) -> dict[str, Outcome]:
        """Let all replicas make it. What became of it at each of those that made it, this one first.

        Raises the error of this replica when no replica could, and `ReplicasDifferError` when some could not.
        """
        # Shielded: a client that leaves changes nothing, as some have made it already.
        outcomes, error = await asyncio.shield(self._kept(self._offered(change)))
        done = {name: one for name, one in outcomes.items() if not one.reason}
        if not done and error is not None:
            raise error
        moot = MOOT.get(change.method)
        refusals = {name: one.message for name, one in outcomes.items() if one.reason and one.reason != moot}
        if refusals or not done:
            raise ReplicasDifferError(change.method, len(outcomes), refusals)
        return dict(sorted(done.items(), key=lambda one: one[0] != self.name))

    async def _offered(self, change: Change) -> tuple[dict[str, Outcome], BaseException | None]:
        """What became of it at all replicas, and why it could not be made at this one."""
        number = await self._log.offer(change)
        outcomes = await self._log.outcomes(number)
        return outcomes, self._errors.pop(number, None)

    def _kept(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _follow(self) -> None:
        lost = False
        while True:
            try:
                if lost:
                    await self._log.restore(self._made.values())
                    lost = False
                self._begin(await self._log.news(self.name, self._last, serves=True, timeout_s=POLL_S))
            except ChangesLostError as error:
                _log.warning("%s", error)
                lost = True
                await asyncio.sleep(RETRY_S)

    def _begin(self, entries: Iterable[Entry]) -> None:
        """Tasks get to a lock in the order in which they were made, and through it in the same one."""
        for entry in entries:
            self._last = max(self._last, entry.number)
            self._kept(self._make_in_turn(entry))

    async def _make_in_turn(self, entry: Entry) -> None:
        turn = self._turns.setdefault(entry.change.name, asyncio.Lock())
        async with turn:
            outcome = await self._outcome(entry)
        try:
            await self._log.report(self.name, entry.number, outcome)
        except ChangesLostError as error:  # who waits for it is told so, too
            _log.warning("%s", error)

    async def _outcome(self, entry: Entry) -> Outcome:
        try:
            response = await self._make(entry.change)
        except Exception as error:  # a bug as well: others must not wait for it
            if entry.change.origin == self.name:
                self._errors[entry.number] = error
            else:
                _log.warning("%s of %r: %s", entry.change.method, entry.change.name, error)
            known = explain(error)
            return Outcome(reason=known.reason, message=known.message)
        if entry.change.is_kept:
            self._made = with_change(self._made, entry)
        return Outcome(response=response)
