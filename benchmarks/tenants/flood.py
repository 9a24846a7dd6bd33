"""One tenant's flood of streams: what it costs another one that asks now and then."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from benchmarks.catalogue.base import Base
from benchmarks.catalogue.gate import Gate, PartResult
from benchmarks.tenants.plan import Plan
from benchmarks.tenants.serving import Asked, ask, engine_of
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.plan import StepPlan

TIMES_ALONE = 2.0


async def flood(base: Base, plan: Plan) -> PartResult:
    async with engine_of(base, plan.rows) as engine:
        alone_s = await _light(engine, base, plan)
        asked = Asked(tenant="flood", prompt=plan.flood_prompt, output=plan.flood_output)

        async def again() -> None:
            while True:
                await ask(engine, base, asked)

        streams = [asyncio.create_task(again()) for _ in range(plan.flood_streams)]
        while engine.load().running < plan.rows:  # noqa: ASYNC110  # a count of another thread
            await asyncio.sleep(0.01)
        with _steps_of(engine) as steps_s:
            beside_s = await _light(engine, base, plan)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    alone, beside, step_s = (float(np.percentile(times_s, 99)) for times_s in (alone_s, beside_s, steps_s))
    figures = {
        "alone_p50_ms": round(1e3 * float(np.median(alone_s)), 1),
        "alone_p99_ms": round(1e3 * alone, 1),
        "beside_p50_ms": round(1e3 * float(np.median(beside_s)), 1),
        "beside_p99_ms": round(1e3 * beside, 1),
        "step_p50_ms": round(1e3 * float(np.median(steps_s)), 1),
        "step_p99_ms": round(1e3 * step_s, 1),
    }
    limit = TIMES_ALONE * alone + step_s
    return PartResult(
        figures, [Gate("first token beside a flood, over 2 x alone + a step", beside / limit, 1.0, is_speed=True)]
    )


@contextmanager
def _steps_of(engine: AsyncEngine) -> Iterator[list[float]]:
    """What each step took, from here on."""
    taken_s: list[float] = []
    times = engine._parts.engine.times  # noqa: SLF001  # a listener would be there for nobody else
    observe = times.observe

    def note(plan: StepPlan, seconds: float) -> None:
        taken_s.append(seconds)
        observe(plan, seconds)

    times.observe = note  # type: ignore[method-assign]
    try:
        yield taken_s
    finally:
        times.observe = observe  # type: ignore[method-assign]


async def _light(engine: AsyncEngine, base: Base, plan: Plan) -> list[float]:
    asked = Asked(tenant="light", prompt=plan.light_prompt, output=plan.light_output)
    firsts_s = []
    for _ in range(plan.light_requests):
        firsts_s.append(await ask(engine, base, asked))
        await asyncio.sleep(plan.light_pause_s)
    return firsts_s
