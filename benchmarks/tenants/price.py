"""What sharing costs: the same requests, for one tenant, which is first come first served, and for eight."""

from __future__ import annotations

import asyncio
import statistics
import time

from benchmarks.catalogue.base import Base
from benchmarks.catalogue.gate import Gate, PartResult
from benchmarks.tenants.plan import Plan
from benchmarks.tenants.serving import Asked, ask, engine_of
from gralora_runtime.async_engine import AsyncEngine

TENANTS = 8
LEAST_THROUGHPUT = 0.97


async def price(base: Base, plan: Plan) -> PartResult:
    """By turns, so that a slow minute of the machine meets both."""
    times: dict[int, list[float]] = {1: [], TENANTS: []}
    async with engine_of(base, plan.rows) as engine:
        for number in range(2 * plan.rounds):
            tenants = (1, TENANTS)[number % 2 if number // 2 % 2 == 0 else 1 - number % 2]
            times[tenants].append(await _run(engine, base, plan, tenants))
    ratio = statistics.median(one / many for one, many in zip(times[1], times[TENANTS], strict=True))
    figures = {
        "first_come_s": [round(time_s, 2) for time_s in times[1]],
        "fair_s": [round(time_s, 2) for time_s in times[TENANTS]],
        "throughput_over_first_come": round(ratio, 4),
    }
    gate = Gate("time over first come first served", 1 / ratio, 1 / LEAST_THROUGHPUT, is_speed=True)
    return PartResult(figures, [gate])


async def _run(engine: AsyncEngine, base: Base, plan: Plan, tenants: int) -> float:
    """Long and short prompts and answers, all at once; seconds to the last token."""
    asked = [
        Asked(
            tenant=f"t{number % tenants}",
            prompt=(16, 128, 48, 256)[number % 4],
            output=(32, 8, 24, 16)[number % 4],
        )
        for number in range(plan.batch_requests)
    ]
    begin_s = time.perf_counter()
    await asyncio.gather(*(ask(engine, base, one) for one in asked))
    return time.perf_counter() - begin_s
