"""The soak itself: capacity first, then the open loop beside operators, then what is left. Judges nothing."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.catalogue.churn import Churn
from benchmarks.catalogue.soak import unload_all
from benchmarks.soak import health
from benchmarks.soak.customers import ADMIN, CUSTOMERS, write_configuration
from benchmarks.soak.health import Health
from benchmarks.soak.plan import Plan
from benchmarks.soak.traffic import Sent, Traffic
from gralora_server.client import AsyncClient, TenantUsage
from gralora_server.loadtest.local_server import LocalServer
from gralora_server.loadtest.metrics_page import Page

QUIET_S = 30.0  # within which everything under way has ended


@dataclass(slots=True, kw_only=True)
class Observed:
    """`before`, `after`: the process when nothing was under way."""

    sent: Sequence[Sent]
    begun_s: float  # of the open loop, by time.monotonic
    ended_s: float
    capacity_per_s: float
    offered_per_s: float
    before: Health
    after: Health
    samples: Sequence[Health]
    usage: Sequence[TenantUsage]
    page: Page
    left: dict[str, float]
    reloads: int
    looks: int = 0  # at lists, usage and metrics
    problems: list[str] = field(default_factory=list)


async def observe(server: LocalServer, churn: Churn, plan: Plan, configuration: Path, *, seed: int) -> Observed:
    """An interrupt ends the open loop early; what was had by then is told."""
    async with _clients(server.address) as (operator, clients):
        traffic = Traffic(
            names=churn.names,
            vocab_size=churn.fleet.contents.base.vocab_size,
            digest_of=churn.digest_of,
            seed=seed,
            clients=clients,
        )
        operators = Operators(server, operator, churn, plan, configuration)
        # Everything that is made once has been by then.
        async with operators.at_work():
            await traffic.closed_loop(plan.clients, plan.capacity_s / 3)
            capacity_per_s = await traffic.closed_loop(plan.clients, plan.capacity_s)
        await _quiet(operator)
        begun_s = time.monotonic()
        before, samples = health.look(server, begun_s), list[Health]()
        offered_per_s = plan.load * capacity_per_s
        watching = asyncio.create_task(health.watch(server, plan.sample_s, begun_s, samples))
        until_s = begun_s + 60 * plan.minutes
        with _interrupts() as interrupted:
            async with operators.at_work():
                await traffic.open_loop(offered_per_s, lambda: interrupted.is_set() or time.monotonic() >= until_s)
        ended_s = time.monotonic()
        watching.cancel()
        churn.end()
        await _quiet(operator)
        assert server.metrics_address is not None
        page = await asyncio.to_thread(Page.read, server.metrics_address)
        usage = await operator.usage()
        left = await unload_all(operator, server.metrics_address)
        return Observed(
            sent=traffic.sent,
            begun_s=begun_s,
            ended_s=ended_s,
            capacity_per_s=capacity_per_s,
            offered_per_s=offered_per_s,
            before=before,
            after=health.look(server, begun_s),
            samples=samples,
            usage=usage,
            page=page,
            left=left,
            reloads=operators.reloads,
            looks=operators.looks,
            problems=operators.problems,
        )


class Operators:
    """Those who change adapters, those who change settings, and whoever looks how it goes."""

    def __init__(self, server: LocalServer, client: AsyncClient, churn: Churn, plan: Plan, configuration: Path) -> None:
        self._server = server
        self._client = client
        self._churn = churn
        self._plan = plan
        self._configuration = configuration
        self.reloads = 0
        self.looks = 0
        self.problems: list[str] = []

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Until the block ends; changes that have begun are finished."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._churn.operate(self._client, self._plan.operators, stop.is_set))
            group.create_task(self._change_settings(stop))
            group.create_task(self._look(stop))
            try:
                yield
            finally:
                stop.set()

    async def _change_settings(self, stop: asyncio.Event) -> None:
        while not await _set_within(stop, self._plan.settings_s):
            self.reloads += 1
            write_configuration(self._configuration, self.reloads)
            if self.reloads % 2:
                changed = await self._client.reload_config()
                if "objectives" not in changed:
                    self.problems.append(f"reload {self.reloads} changed {changed}")
            else:
                self._server.process.send_signal(signal.SIGHUP)

    async def _look(self, stop: asyncio.Event) -> None:
        last: dict[tuple[str, str], int] = {}
        while not await _set_within(stop, self._plan.sample_s):
            self.looks += 1
            listed = await self._client.adapters.list()
            if not listed:
                self.problems.append("a list was empty")
            for row in await self._client.usage():
                key = (row.tenant, row.adapter)
                if row.output_tokens < last.get(key, 0):
                    self.problems.append(f"the output tokens of {key} fell from {last[key]} to {row.output_tokens}")
                last[key] = row.output_tokens
            assert self._server.metrics_address is not None
            await asyncio.to_thread(Page.read, self._server.metrics_address)


@asynccontextmanager
async def _clients(address: str) -> AsyncIterator[tuple[AsyncClient, dict[str, AsyncClient]]]:
    """An operator, and one for each tenant."""
    async with AsyncExitStack() as stack:
        operator = await stack.enter_async_context(AsyncClient(address, token=ADMIN))
        clients = {one.name: AsyncClient(address, token=one.token) for one in CUSTOMERS}
        for client in clients.values():
            await stack.enter_async_context(client)
        yield operator, clients


@contextmanager
def _interrupts() -> Iterator[asyncio.Event]:
    """Set by an interrupt of this process, which then does nothing else."""
    interrupted, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, interrupted.set)
    try:
        yield interrupted
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _quiet(client: AsyncClient) -> None:
    """Nothing is under way; if something is after all, what is left says so."""
    until_s = time.monotonic() + QUIET_S
    while time.monotonic() < until_s:
        load = await client.load()
        if not (load.running or load.waiting or load.waiting_for_adapter or load.paused):
            return
        await asyncio.sleep(0.1)


async def _set_within(stop: asyncio.Event, seconds: float) -> bool:
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
    return stop.is_set()
