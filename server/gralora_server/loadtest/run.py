"""One load test: a trace to one server, and the result of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from gralora_server.client import AsyncClient
from gralora_server.client.connection import Connection
from gralora_server.loadtest.churn import Churn
from gralora_server.loadtest.driver import Driver, DriverResult, Progress
from gralora_server.loadtest.metrics_page import Page, story
from gralora_server.loadtest.overload import Overload, overload
from gralora_server.loadtest.patience import Patience
from gralora_server.loadtest.result import RunResult, Sample
from gralora_server.loadtest.summary import Slo, Window, generator_health, summarise
from gralora_server.loadtest.trace import Trace

LOADS_AT_ONCE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server. Failed calls are not tried again, since what fails is to be seen."""

    connection: Connection
    metrics_address: str | None = None  # HOST:PORT of its page
    memory_bytes: Callable[[], int | None] = field(default=lambda: None)  # None: the page's figure
    tokens: Mapping[str, str] = field(default_factory=dict)  # by tenant; who has none here has the connection's

    @classmethod
    def at(cls, connection: Connection, metrics_address: str | None = None) -> Target:
        return cls(connection=replace(connection, max_attempts=1), metrics_address=metrics_address)


async def adapter_names(connection: Connection) -> list[str]:
    """Of all that the server has, in alphabetical order."""
    async with _client(connection) as client:
        return sorted(adapter.name for adapter in await client.adapters.list())


async def load_adapters(target: Target, names: Iterable[str]) -> None:
    """Bring these into the server's memory, in this order: what comes last is evicted last."""
    waiting = iter(names)

    async def load_some(client: AsyncClient) -> None:
        for name in waiting:
            await client.adapters.load(name)

    async with _client(target.connection) as client:
        await client.wait_ready()
        await asyncio.gather(*(load_some(client) for _ in range(LOADS_AT_ONCE)))


async def run(
    target: Target,
    trace: Trace,
    *,
    system: str,
    label: str,
    slo: Slo,
    churn: Churn | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    drain_s: float = 60.0,
    patience: Patience | None = None,
    weights: Mapping[str, float] | None = None,
) -> RunResult:
    """`patience` of each user, None: endless; `weights` of tenants, None: all alike.

    Raises a GraloraClientError if the server cannot be reached, ConfigError if its metrics page cannot.
    """
    async with _client(target.connection) as client:
        await client.wait_ready()
        info = await client.info()
        driver = Driver(
            target.connection,
            info.vocab_size,
            drain_s=drain_s,
            on_progress=on_progress,
            patience=patience or Patience(),
            tokens=target.tokens,
            memory_bytes=target.memory_bytes,
        )
        before = await _page(target)
        async with nullcontext() if churn is None else churn.running(client):
            driven = await driver.run(trace)
        after = await _page(target)
    memory_bytes = target.memory_bytes() or (None if after is None else after.memory_bytes)
    return RunResult(
        system=system,
        num_adapters=len(trace.adapters),
        summary=summarise(
            label,
            driven.records,
            window=Window(trace.warmup_s, trace.duration_s),
            slo=slo,
            generator=generator_health(driven.records, driven.wake_lags_s, driven.cpu_share),
        ),
        timeline=timeline(driven),
        server=None if before is None or after is None else story(before, after),
        memory_bytes=memory_bytes,
        churn=None if churn is None else churn.stats(),
        overload=_overload(driven, trace, slo, patience, weights or {}),
    )


def _overload(
    driven: DriverResult, trace: Trace, slo: Slo, patience: Patience | None, weights: Mapping[str, float]
) -> Overload | None:
    """None where neither the users nor their arrivals say that there may be one."""
    if patience is None and not trace.tenants and trace.peak is None:
        return None
    return overload(
        driven.records,
        window=Window(trace.warmup_s, trace.duration_s),
        slo=slo,
        patience=patience or Patience(),
        weights=weights,
        peak=trace.peak,
    )


def timeline(driven: DriverResult) -> tuple[Sample, ...]:
    """What each second brought."""
    return tuple(
        Sample(
            at_s=now.at_s,
            tokens=now.tokens - earlier.tokens,
            requests_ended=now.ended - earlier.ended,
            in_flight=now.in_flight,
            memory_bytes=now.memory_bytes,
        )
        for earlier, now in zip([Progress(), *driven.samples], driven.samples, strict=False)
    )


def _client(connection: Connection) -> AsyncClient:
    return AsyncClient(
        connection.target, tls=connection.tls, token=connection.token, metadata=connection.metadata, max_attempts=1
    )


async def _page(target: Target) -> Page | None:
    return None if target.metrics_address is None else await asyncio.to_thread(Page.read, target.metrics_address)
