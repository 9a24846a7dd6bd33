"""Operators who change adapters while they are asked: new files, promotions, canaries, pins, unloads.

Each name is changed by one of them at a time, and its history says what its requests may get meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.catalogue.content import exchange_directory, exchange_files, put_in_place
from benchmarks.catalogue.fleet import Fleet
from benchmarks.catalogue.history import ABSENT, History
from gralora_server.client import Adapter, AsyncClient, GraloraClientError

FIRST_NEW = 1_000_000  # contents that no adapter had at the start
FOLLOWED_S = 30.0  # within which a server takes note of new files by itself
POLL_S = 0.1
HOLD_S = (0.2, 2.0)  # how long a canary, a pin or an absence lasts
HOT = 50  # half of the changes are of so many names, the most popular ones
REPLACEMENTS = (exchange_files, exchange_directory, put_in_place)
# What a request may hear while files are exchanged, and of a version whose files have become others.
HALF_WRITTEN = frozenset({"ADAPTER_REJECTED", "ADAPTER_VERSION_LOST", "ADAPTER_NOT_FOUND"})
LOST = frozenset({"ADAPTER_VERSION_LOST"})
EXPECTED = {"unload": {"ADAPTER_BUSY"}, "unload a version": {"ADAPTER_BUSY"}}


@dataclass(slots=True)
class Changing:
    """A name, and what is known of it."""

    name: str
    history: History
    on_disk: int  # content of its directory
    kept: set[int] = field(default_factory=set)  # contents that it was given from elsewhere, where they stay
    lost_since_s: float | None = None  # it stands for a content that can be read nowhere
    changes: int = 0
    trail: list[tuple[float, str]] = field(default_factory=list)  # when, what
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def stand_for(self, content: int, sent_s: float, acknowledged_s: float) -> None:
        self.history.change(content, sent_s, acknowledged_s)
        self.changes += 1
        if self.lost_since_s is not None:
            self.history.excuse(LOST, self.lost_since_s, acknowledged_s)
        self.lost_since_s = None if content == ABSENT or self.can_read(content) else sent_s

    def can_read(self, content: int) -> bool:
        return content == self.on_disk or content in self.kept

    def step(self, what: str) -> None:
        self.trail.append((time.monotonic(), what))

    def last_steps(self) -> str:
        return ", ".join(what for _, what in self.trail[-4:])

    def end(self) -> None:
        """Nothing is changed any more."""
        if self.lost_since_s is not None:
            self.history.excuse(LOST, self.lost_since_s, time.monotonic())


@dataclass(slots=True)
class Churn:
    """`problems`: what acknowledgements said that cannot be."""

    fleet: Fleet
    names: Sequence[str]  # the most popular first
    seed: int
    pause_s: float = 0.0  # of an operator between two changes
    by_name: dict[str, Changing] = field(init=False)
    digests: dict[int, str] = field(default_factory=dict)  # by content, those that were needed
    contents: dict[str, int] = field(default_factory=dict)  # the other way round
    counts: Counter[str] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _workers: itertools.count[int] = field(default_factory=itertools.count)
    _pinning: asyncio.Lock = field(default_factory=asyncio.Lock)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(FIRST_NEW))

    def __post_init__(self) -> None:
        initial = self.fleet.initial
        self.by_name = {name: Changing(name, History.of(initial[name]), initial[name]) for name in self.names}

    def digest_of(self, name: str) -> str:
        return self.digests.get(self.by_name[name].history.current, "")

    def note(self, content: int, directory: Path) -> str:
        """The content lies there, and nobody changes it now."""
        if content not in self.digests:
            self.digests[content] = self.fleet.contents.digest(directory)
            self.contents[self.digests[content]] = content
        return self.digests[content]

    async def run(self, client: AsyncClient, workers: int, until_s: float) -> None:
        await self.operate(client, workers, lambda: time.monotonic() >= until_s)
        self.end()

    async def operate(self, client: AsyncClient, workers: int, is_over: Callable[[], bool]) -> None:
        """Returns when the changes that had begun by then are done. May be called again."""
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                drawn = random.Random(f"{self.seed} {next(self._workers)}")
                group.create_task(self._operate(client, drawn, is_over))

    def end(self) -> None:
        """Nothing is changed any more."""
        for one in self.by_name.values():
            one.end()

    async def _operate(self, client: AsyncClient, drawn: random.Random, is_over: Callable[[], bool]) -> None:
        kinds: list[tuple[str, int, Callable[[AsyncClient, random.Random, Changing], Awaitable[None]]]] = [
            ("replace", 6, self._replace),
            ("load from elsewhere", 2, self._load_from_elsewhere),
            ("roll back", 4, self._roll_back),
            ("promote", 3, self._promote),
            ("canary", 3, self._canary),
            ("pin", 2, self._pin),
            ("unload", 2, self._unload),
            ("unload a version", 1, self._unload_version),
        ]
        while not is_over():
            name = drawn.choice(self.names[:HOT] if drawn.random() < 0.5 else self.names)
            what, _, change = drawn.choices(kinds, weights=[weight for _, weight, _ in kinds])[0]
            one = self.by_name[name]
            if one.lock.locked():
                await asyncio.sleep(0)
                continue
            async with one.lock:
                await self._attempt(client, drawn, one, what, change)
            await asyncio.sleep(drawn.uniform(0.0, 2 * self.pause_s))

    async def _attempt(
        self,
        client: AsyncClient,
        drawn: random.Random,
        one: Changing,
        what: str,
        change: Callable[[AsyncClient, random.Random, Changing], Awaitable[None]],
    ) -> None:
        begun_s = time.monotonic()
        one.step(what)
        try:
            await asyncio.to_thread(self.note, one.on_disk, self.fleet.directory / one.name)
            await change(client, drawn, one)
        except GraloraClientError as error:
            reason = error.reason or error.code.name
            self.counts[f"{what}: {reason}"] += 1
            if reason not in EXPECTED.get(what, set()):
                self.unexpected[f"{what}: {reason}"] += 1
                self.problems.append(f"{one.name} ({one.last_steps()}): {error}")
            await self._settle(client, one, begun_s)

    async def _settle(self, client: AsyncClient, one: Changing, begun_s: float) -> None:
        """Something went wrong on the way: what does the name stand for now?"""
        try:
            now = await client.adapters.get(one.name)
        except GraloraClientError:
            one.stand_for(ABSENT, begun_s, time.monotonic())
            now = await client.adapters.load(one.name)
        content = self.contents.get(now.digest)
        if content is not None and content != one.history.current:
            one.stand_for(content, begun_s, time.monotonic())

    async def _replace(self, client: AsyncClient, drawn: random.Random, one: Changing) -> None:
        before = await client.adapters.get(one.name)
        number = next(self._numbers)
        staged = await asyncio.to_thread(self.fleet.stage, number)
        digest = await asyncio.to_thread(self.note, number, staged)
        exchange = drawn.choice(REPLACEMENTS)
        one.step(exchange.__name__)
        begun_s = time.monotonic()
        one.on_disk = number
        await asyncio.to_thread(exchange, staged, self.fleet.directory / one.name)
        try:
            if before.digest and drawn.random() < 0.5:
                await self._followed(client, one, digest)
            else:
                self._check("load", one, await client.adapters.load(one.name), digest)
        finally:
            one.history.excuse(HALF_WRITTEN, begun_s, time.monotonic())
        one.stand_for(number, begun_s, time.monotonic())
        self.counts[f"replace, {exchange.__name__}"] += 1

    async def _followed(self, client: AsyncClient, one: Changing, digest: str) -> None:
        until_s = time.monotonic() + FOLLOWED_S
        one.step("wait")
        while time.monotonic() < until_s:
            if (await client.adapters.get(one.name)).digest == digest:
                return
            await asyncio.sleep(POLL_S)
        self.problems.append(f"{one.name} ({one.last_steps()}): new files were not followed")
        self._check("load", one, await client.adapters.load(one.name), digest)

    async def _load_from_elsewhere(self, client: AsyncClient, drawn: random.Random, one: Changing) -> None:  # noqa: ARG002
        number = next(self._numbers)
        staged = await asyncio.to_thread(self.fleet.stage, number)
        digest = await asyncio.to_thread(self.note, number, staged)
        elsewhere = self.fleet.directory / ".kept" / str(number)
        elsewhere.parent.mkdir(exist_ok=True)
        staged.rename(elsewhere)
        one.kept.add(number)
        begun_s = time.monotonic()
        self._check("load", one, await client.adapters.load(one.name, elsewhere), digest)
        one.stand_for(number, begun_s, time.monotonic())
        self.counts["load from elsewhere"] += 1

    async def _roll_back(self, client: AsyncClient, drawn: random.Random, one: Changing) -> None:  # noqa: ARG002
        before = await client.adapters.get(one.name)
        wanted = next((v.digest for v in before.versions if v.number == before.previous_version), "")
        if wanted not in self.contents:
            return
        begun_s = time.monotonic()
        self._check("roll back", one, await client.adapters.rollback(one.name), wanted)
        one.stand_for(self.contents[wanted], begun_s, time.monotonic())
        self.counts["roll back"] += 1

    async def _promote(self, client: AsyncClient, drawn: random.Random, one: Changing) -> None:
        other = self._other(await client.adapters.get(one.name), drawn)
        if other is None:
            return
        number, digest = other
        version = drawn.choice([str(number), f"sha256:{digest}"])
        begun_s = time.monotonic()
        self._check("promote", one, await client.adapters.promote(one.name, version), digest)
        one.stand_for(self.contents[digest], begun_s, time.monotonic())
        self.counts["promote"] += 1

    async def _canary(self, client: AsyncClient, drawn: random.Random, one: Changing) -> None:
        other = self._other(await client.adapters.get(one.name), drawn)
        if other is None or not one.can_read(self.contents[other[1]]):
            return
        number, digest = other
        begun_s = time.monotonic()
        one.changes += 1
        try:
            await client.adapters.set_canary(one.name, str(number), drawn.choice([0.1, 0.5, 1.0]))
            await asyncio.sleep(drawn.uniform(*HOLD_S))
            await client.adapters.set_canary(one.name, str(number), 0.0)
        finally:
            one.history.share(self.contents[digest], begun_s, time.monotonic())
        self.counts["canary"] += 1

    async def _pin(self, client: AsyncClient, drawn: random.Random, one: Changing) -> None:
        async with self._pinning:  # several large ones may leave others no room at all, which is then told as an error
            await client.adapters.pin(one.name)
            await asyncio.sleep(drawn.uniform(*HOLD_S))
            await client.adapters.pin(one.name, pinned=False)
        self.counts["pin"] += 1

    async def _unload(self, client: AsyncClient, drawn: random.Random, one: Changing) -> None:
        begun_s = time.monotonic()
        await client.adapters.unload(one.name)
        one.stand_for(ABSENT, begun_s, time.monotonic())
        one.kept.clear()
        await asyncio.sleep(drawn.uniform(*HOLD_S))
        begun_s = time.monotonic()
        self._check("load", one, await client.adapters.load(one.name), self.digests[one.on_disk])
        one.stand_for(one.on_disk, begun_s, time.monotonic())
        self.counts["unload"] += 1

    async def _unload_version(self, client: AsyncClient, drawn: random.Random, one: Changing) -> None:
        other = self._other(await client.adapters.get(one.name), drawn)
        if other is None:
            return
        one.changes += 1
        await client.adapters.unload(f"{one.name}@{other[0]}")
        self.counts["unload a version"] += 1

    def _other(self, known: Adapter, drawn: random.Random) -> tuple[int, str] | None:
        """Number and digest of a version that the name does not stand for."""
        others = [
            (v.number, v.digest) for v in known.versions if v.number != known.version and v.digest in self.contents
        ]
        return drawn.choice(others) if others else None

    def _check(self, what: str, one: Changing, answer: Adapter, digest: str) -> None:
        if answer.digest != digest:
            told, meant = self.contents.get(answer.digest), self.contents[digest]
            self.problems.append(
                f"{one.name} ({one.last_steps()}): {what} was acknowledged with content {told}, not {meant}"
            )
