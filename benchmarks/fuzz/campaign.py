"""Many mutated requests to one server, round after round; after each the server is looked at, and put in order."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

from benchmarks.faults.stage import Stage, Tokens
from benchmarks.fuzz.caller import Caller
from benchmarks.fuzz.mutants import Mutant, Mutants
from benchmarks.fuzz.stand import UNDISTURBED, VICTIMS, Stand
from benchmarks.fuzz.verdict import growth_of, leftovers_of, problem_of
from gralora_server.client import AsyncClient, FailedPreconditionError, GraloraClientError
from gralora_server.loadtest.local_server import LocalServer

ROUND = 1000  # requests
AT_ONCE = 48
PROBE_EVERY = 100  # requests
IDLE_S = 20.0  # within which a server that nobody calls has to have given everything back
LOOK_S = 0.02


@dataclass(slots=True)
class Report:
    """`saw`: calls of each method by how they ended. `memory_bytes`: after each round. `offenders`: by number."""

    requests: int = 0
    probes: int = 0
    seconds: float = 0.0
    saw: Counter[tuple[str, str]] = field(default_factory=Counter)
    memory_bytes: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    offenders: dict[int, Mutant] = field(default_factory=dict)

    @property
    def growth_bytes(self) -> tuple[int, int]:
        """What the server took after the first quarter, and at the end."""
        return self.memory_bytes[len(self.memory_bytes) // 4], self.memory_bytes[-1]


async def run(stand: Stand, server: LocalServer, mutants: Mutants, *, requests: int, seconds: float) -> Report:
    """Until one of both is reached, or something was found."""
    report, started_s = Report(), time.monotonic()
    async with Caller(server.address) as caller, AsyncClient(server.address) as client:
        await client.adapters.pin(UNDISTURBED)
        rounds = _Rounds(stand.stage, server, mutants, caller, client, report)
        await rounds.begin()
        while not report.problems and report.requests < requests and time.monotonic() - started_s < seconds:
            await rounds.go_on(min(ROUND, requests - report.requests))
        if not report.problems:
            report.problems += filter(None, [growth_of(*report.growth_bytes)])
    report.seconds = time.monotonic() - started_s
    return report


@dataclass(slots=True)
class _Rounds:
    stage: Stage
    server: LocalServer
    mutants: Mutants
    caller: Caller
    client: AsyncClient
    report: Report
    expected: Tokens = ()

    async def begin(self) -> None:
        self.expected = await self.stage.answer(self.client, UNDISTURBED)

    async def go_on(self, count: int) -> None:
        numbers = iter(range(self.report.requests, self.report.requests + count))
        await asyncio.gather(*(self._send(numbers) for _ in range(AT_ONCE)))
        memory_bytes = self.server.memory_bytes
        if memory_bytes is None or self.server.process.status() == psutil.STATUS_ZOMBIE:
            self.report.problems.append("the server died")
            return
        try:
            await self._put_in_order()
        except GraloraClientError as error:
            self.report.problems.append(f"afterwards, what anybody may do failed: {error}")
            return
        self.report.memory_bytes.append(self.server.memory_bytes or 0)

    async def _send(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            if self.report.problems:
                return
            mutant = self.mutants.make(number)
            ending = await self.caller.send(mutant)
            self.report.requests += 1
            self.report.saw[mutant.method.name, ending.label] += 1
            problem = problem_of(ending)
            if problem is not None:
                self.report.problems.append(f"request {number}, {mutant.method.name}: {problem}")
                self.report.offenders[number] = mutant
            if number % PROBE_EVERY == 0:
                await self._probe(number)

    async def _probe(self, number: int) -> None:
        """A good request of somebody else, while all this goes on."""
        self.report.probes += 1
        try:
            found = await self.stage.answer(self.client, UNDISTURBED)
        except GraloraClientError as error:
            self.report.problems.append(f"at request {number} a good request was refused: {error}")
            return
        if found != self.expected:
            self.report.problems.append(f"at request {number} a good answer was {found}, not {self.expected}")

    async def _put_in_order(self) -> None:
        """Nothing is held any more; what requests made is removed, and what they removed is back."""
        end_s = time.monotonic() + IDLE_S
        while (left := leftovers_of(await self.client.load())) is not None:
            if time.monotonic() > end_s:
                self.report.problems.append(left)
                return
            await asyncio.sleep(LOOK_S)
        for adapter in await self.client.adapters.list():
            if adapter.name not in self.stage.names:
                await self._remove(adapter.name)
        for name in VICTIMS:
            await self.client.adapters.load(name)
            await self.client.adapters.pin(name, pinned=False)

    async def _remove(self, name: str) -> None:
        try:
            await self.client.adapters.unload(name, delete_upload=True)
        except FailedPreconditionError:  # it was not uploaded
            await self.client.adapters.unload(name)
