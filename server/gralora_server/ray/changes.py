"""The changes that all replicas make, in one order: an actor of the cluster, and plain asyncio that knows no Ray.

A replica follows by asking for news all the time, and says what became of each change. One that has not asked for
`GONE_S` is not waited for any more. What was kept is for replicas that start later.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from gralora_server.ray.change import Change, Entry, Outcome, with_change

GONE_S = 10.0
LOOK_S = 1.0  # so often it is looked whether somebody has gone meanwhile


class Changes:
    """Belongs to one event loop."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic, clock_s: Callable[[], float] = time.time) -> None:
        """`clock_s`: numbers are taken from it, so that they grow even when all this starts anew."""
        self._now_s = now_s
        self._clock_s = clock_s
        self._kept: dict[int, Entry] = {}  # in their order, as the next one is
        self._open: dict[int, Entry] = {}  # somebody waits for their outcomes
        self._outcomes: dict[int, dict[str, Outcome]] = {}  # of those
        self._last = 0
        self._seen_s: dict[str, float] = {}  # followers
        self._counted: set[str] = set()  # of those, the ones that serve
        self._news = asyncio.Condition()

    async def offer(self, change: Change) -> int:
        """Its number. Everybody who follows gets it from now on."""
        async with self._news:
            self._seen_s[change.origin] = self._now_s()  # which may follow nothing yet, if all this has started anew
            self._forget()
            self._last = max(self._last + 1, int(self._clock_s() * 1000))
            entry = Entry(self._last, change)
            self._open[entry.number] = entry
            self._outcomes[entry.number] = {}
            if change.is_kept:
                self._kept[entry.number] = entry
            self._news.notify_all()
            return entry.number

    async def news(self, name: str, after: int, *, serves: bool, timeout_s: float) -> list[Entry]:
        """What came after a number, as soon as there is something, else nothing when the time is over. `serves`:
        others wait for what becomes of changes at this replica.
        """
        async with self._news:
            self._seen_s[name] = self._now_s()
            if serves:
                self._counted.add(name)
            found = self._after(after)
            if not found and timeout_s > 0:
                try:
                    async with asyncio.timeout(timeout_s):
                        await self._news.wait_for(lambda: self._after(after))
                except TimeoutError:
                    return []
                found = self._after(after)
            self._seen_s[name] = self._now_s()
            return found

    async def report(self, name: str, number: int, outcome: Outcome) -> None:
        """What became of a change at one replica."""
        async with self._news:
            self._seen_s[name] = self._now_s()
            if number in self._outcomes:
                self._outcomes[number][name] = outcome
                self._news.notify_all()

    async def outcomes(self, number: int) -> dict[str, Outcome]:
        """At every replica that serves and is there, once all have told. Whoever offered a change has to ask."""
        async with self._news:
            while self._missing(number):
                try:
                    async with asyncio.timeout(LOOK_S):
                        await self._news.wait()
                except TimeoutError:
                    continue
            return self._settle(number)

    async def restore(self, entries: Iterable[Entry]) -> None:
        """What a replica has made: for changes that were forgotten because all this started anew."""
        async with self._news:
            known = self._kept | {entry.number: entry for entry in entries if entry.change.is_kept}
            self._kept = dict(sorted(known.items()))
            self._last = max(self._last, *self._kept, 0)

    async def leave(self, name: str) -> None:
        """It is not waited for."""
        async with self._news:
            self._seen_s.pop(name, None)
            self._counted.discard(name)
            self._news.notify_all()

    def _after(self, number: int) -> list[Entry]:
        entries = self._kept | self._open
        return [entries[one] for one in sorted(entries) if one > number]

    def _missing(self, number: int) -> set[str]:
        """Who has to tell yet: of those that are there, all that serve, and the one that asked."""
        if number not in self._open:
            return set()
        there = {name for name, seen_s in self._seen_s.items() if self._now_s() - seen_s < GONE_S}
        return ((self._counted | {self._open[number].change.origin}) & there) - self._outcomes[number].keys()

    def _forget(self) -> None:
        """What became of changes whose replica has gone, and does not ask any more."""
        gone = {name for name, seen_s in self._seen_s.items() if self._now_s() - seen_s >= GONE_S}
        for name in gone:
            del self._seen_s[name]
        self._counted -= gone
        for number in [one for one, entry in self._open.items() if entry.change.origin not in self._seen_s]:
            self._settle(number)

    def _settle(self, number: int) -> dict[str, Outcome]:
        """What nobody could do is no change."""
        outcomes = self._outcomes.pop(number, {})
        entry = self._open.pop(number, None)
        if entry is not None and entry.change.is_kept:
            self._kept.pop(number, None)
            if any(not outcome.reason for outcome in outcomes.values()):
                self._kept = with_change(self._kept, entry)
        return outcomes
