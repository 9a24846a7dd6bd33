"""Streams that are all under way when a fault happens, and how each of them ended. Knows no fault."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.faults.stage import ANSWERED, PATIENCE_S, WRONG, Stage, Tokens
from gralora_server.client import AsyncClient, GraloraClientError

HUNG = "hung"
BROKEN_OFF = "UNAVAILABLE"  # gRPC's own word for a connection that broke: whoever was killed can give no reason


@dataclass(slots=True, eq=False)
class Stream:
    """One request to `name`, whose answer is known."""

    name: str
    expected: Tokens
    tokens: list[int] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    begun_s: float = 0.0  # by time.monotonic(), and so is what follows
    ended_s: float = 0.0
    ended: str = HUNG

    async def read(self, stage: Stage, client: AsyncClient, **options: Any) -> None:
        """To its end, whatever that is."""
        try:
            async with stage.stream(client, self.name, max_tokens=len(self.expected), **options) as stream:
                async for delta in stream:
                    self.tokens += delta.token_ids
                    if delta.token_ids and not self.begun.is_set():
                        self.begun_s = time.monotonic()
                        self.begun.set()
            self.ended = ANSWERED
        except GraloraClientError as error:
            self.ended = error.reason or error.code.name
        if tuple(self.tokens) != self.expected[: len(self.tokens)] or (self.is_whole is not (self.ended == ANSWERED)):
            self.ended = WRONG
        self.ended_s = time.monotonic()

    @property
    def is_whole(self) -> bool:
        return len(self.tokens) == len(self.expected)


@dataclass(slots=True)
class Streams:
    """Several of them. Made by `under_way`."""

    each: Sequence[Stream]
    tasks: Sequence[asyncio.Task[None]]

    async def saw(self, within_s: float = PATIENCE_S) -> Counter[str]:
        """How they ended; those that have not in time are counted as hung, and cancelled."""
        await asyncio.wait(self.tasks, timeout=within_s)
        for task in self.tasks:
            task.cancel()
        for ended in await asyncio.gather(*self.tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        return Counter(stream.ended for stream in self.each)

    def check_under_way(self) -> None:
        """An experiment in which some were over before the fault says nothing."""
        over = [stream.ended for stream in self.each if stream.ended != HUNG or stream.is_whole]
        assert not over, f"{len(over)} of {len(self.each)} streams had ended before the fault: {over[:4]}"


async def under_way(
    stage: Stage, client: AsyncClient, expected: Mapping[str, Tokens], number: int, **options: Any
) -> Streams:
    """That many, over all names in turn. Each has had its first token when this returns, and none its last one."""
    names = [stage.names[index % len(stage.names)] for index in range(number)]
    each = [Stream(name, expected[name]) for name in names]
    tasks = [asyncio.create_task(stream.read(stage, client, **options)) for stream in each]
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(stream.begun.wait() for stream in each))
    streams = Streams(each, tasks)
    streams.check_under_way()
    return streams


def wrong_in(saw: Mapping[str, int], *allowed: str) -> Iterator[str]:
    """What must not be among how calls ended: whatever is neither answered nor `allowed`."""
    yield from (f"{count} calls ended as {how}" for how, count in saw.items() if how not in (ANSWERED, *allowed))
