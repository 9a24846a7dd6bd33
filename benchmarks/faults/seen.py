"""Keeps account of how calls to a server in trouble end, and of what must never be among it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from benchmarks.faults.stage import ANSWERED, PATIENCE_S, RETRY_S, WRONG, Stage, Tokens
from gralora_server.client import AsyncClient, GraloraClientError
from gralora_server.loadtest.local_server import LocalServer

HUNG = "hung"
HANG_S = 20.0
GIVEN_BACK_S = 5.0
PAUSE_S = 0.02  # between a stream and the next one: what is wanted is that they go on, not a load
UNMEANT = ("", "INTERNAL", "STEP_FAILED")  # reasons that tell a client nothing it could act on

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Seen:
    """`saw` and `problems` of an Outcome."""

    saw: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    async def call(self, what: str, call: Awaitable[T], expected: T | None = None) -> T | None:
        """The answer. None: it failed, and that is written down; so is an answer that is not the expected one."""
        try:
            async with asyncio.timeout(HANG_S):
                found = await call
        except TimeoutError:
            self._end(HUNG, f"{what} hung")
        except GraloraClientError as error:
            self._end(error.reason or error.code.name, f"{what}: {error}" if error.reason in UNMEANT else "")
        else:
            is_right = expected is None or found == expected
            self._end(ANSWERED if is_right else WRONG, "" if is_right else f"{what} answered {found}, not {expected}")
            return found
        return None

    async def refusal(self, what: str, call: Awaitable[T]) -> None:
        """An answer is a problem."""
        if (answer := await self.call(what, call)) is not None:
            self.problems.append(f"{what} was not refused: {answer}")

    @asynccontextmanager
    async def streams(
        self, stage: Stage, client: AsyncClient, expected: Mapping[str, Tokens], *names: str
    ) -> AsyncIterator[None]:
        """Of clients, one for each name, that ask again and again while the block lasts, and have to be answered."""
        over = asyncio.Event()

        async def ask(name: str) -> None:
            while not over.is_set():
                await asyncio.sleep(PAUSE_S)
                if await self.call(name, stage.answer(client, name), expected[name]) is None:
                    self.problems.append(f"{name}, which nothing was done to, was not answered")

        asking = [asyncio.create_task(ask(name)) for name in names]
        try:
            yield
        finally:
            over.set()
            await asyncio.gather(*asking)

    async def descriptors(self, server: LocalServer, before: int) -> None:
        """Those that were opened since have to be closed again."""
        try:
            await until(lambda: server.process.num_fds() <= before, GIVEN_BACK_S)
        except TimeoutError:
            self.problems.append(f"{server.process.num_fds()} descriptors are open; before there were {before}")

    def _end(self, how: str, problem: str) -> None:
        self.saw[how] += 1
        if problem:
            self.problems.append(problem)


async def until(is_so: Callable[[], bool], patience_s: float) -> None:
    """Raises TimeoutError."""
    async with asyncio.timeout(patience_s):
        while not is_so():  # noqa: ASYNC110  # of another process
            await asyncio.sleep(0.02)


async def until_done(act: Callable[[], Awaitable[object]]) -> None:
    """Again and again, until no error comes. Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await act()
            except GraloraClientError:
                await asyncio.sleep(RETRY_S)
            else:
                return
