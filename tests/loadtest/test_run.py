"""A whole run against the fake server: from a trace to the figures of its result."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.fake_server import FakeServer
from gralora_server.client.connection import Connection
from gralora_server.loadtest.patience import Patience
from gralora_server.loadtest.result import RunResult
from gralora_server.loadtest.run import Target, run
from gralora_server.loadtest.summary import Slo
from gralora_server.loadtest.trace import Trace, TraceRequest


def request(number: int, adapter: str, tenant: str = "") -> TraceRequest:
    return TraceRequest(
        arrival_s=0.01 * number, adapter=adapter, prompt_tokens=10, output_tokens=3, seed=number, tenant=tenant
    )


def trace_of(requests: Sequence[TraceRequest], **more) -> Trace:
    return Trace(requests=tuple(requests), warmup_s=0.0, duration_s=60.0, **more)


def result_of(trace: Trace, tokens: dict[str, str] | None = None, **options) -> RunResult:
    async def whole() -> RunResult:
        server, port = await FakeServer().start()
        target = replace(Target.at(Connection(target=f"127.0.0.1:{port}")), tokens=tokens or {})
        try:
            return await run(target, trace, system="fake", label="fake", slo=Slo(ttft_s=60, itl_s=60), **options)
        finally:
            await server.stop(None)

    return asyncio.run(whole())


def test_refusals_and_retries_of_tenants_become_figures() -> None:
    calm = [request(i, "", "calm") for i in range(4)]
    pushy = [request(4 + i, f"refuse={i},retry=0.02", "pushy") for i in range(4)]  # the last one wants four tries

    found = result_of(trace_of([*calm, *pushy]), patience=Patience(retries=2), weights={"calm": 2.0}).overload

    assert found is not None
    assert (found.total.requests, found.total.in_time, found.total.refused) == (8, 7, {"QUEUE_FULL": 1})
    assert found.tenants["calm"].refusals == {}
    assert found.tenants["pushy"].refusals == {"QUEUE_FULL": 0 + 1 + 2 + 3}
    assert found.total.told_s.max == found.total.told_s.p50 == 0.02
    retries = found.total.retries
    assert (retries.came_again, retries.let_in, retries.at_first_retry) == (3, 2, 1)
    assert retries.wait_p25 >= 1.0  # nobody comes sooner than it was told
    assert found.tenants["calm"].served == 4 * (10 + 2 * 3)
    assert found.tenants["calm"].weight == 2.0
    assert sum(one.good for one in found.bins) == 7
    assert sum(one.refusals for one in found.bins) == 6


def test_an_overload_is_told_only_where_there_may_be_one() -> None:
    plain = [request(0, "")]

    assert result_of(trace_of(plain)).overload is None
    assert result_of(trace_of([request(0, "", "somebody")])).overload is not None
    risen = result_of(trace_of(plain, peak=(0.5, 1.0))).overload
    assert risen is not None
    assert risen.recovery is not None
    assert risen.tenants == {}
