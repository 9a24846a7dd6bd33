"""Two tenants that always want more than they get: what each was served over time, and how far apart they were."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.catalogue.base import Base
from benchmarks.catalogue.gate import Gate, PartResult
from benchmarks.tenants.plan import Plan
from benchmarks.tenants.serving import Asked, ask, engine_of
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.scheduling.fairness import bound

SAMPLE_S = 0.1
LEAST_JAIN = 0.99

Sample = tuple[float, float, float]  # seconds, and what each of the two was served


async def share(base: Base, plan: Plan, picture: Path) -> PartResult:
    async with engine_of(base, plan.rows) as engine:
        samples = await _run(engine, base, plan)
    _, many, few = samples[-1]
    differences = [abs(a - b) for _, a, b in samples]
    jain = (many + few) ** 2 / (2 * (many**2 + few**2))
    limit = bound(
        engine.prices,
        longest_prompt=max(plan.many_prompt, plan.few_prompt),
        most_tokens=plan.rows * max(plan.many_prompt + plan.many_output, plan.few_prompt + plan.few_output),
    )
    plot(samples, limit, picture)
    figures = {
        "served": {"many": round(many), "few": round(few)},
        "jain": round(jain, 5),
        "bound": limit,
        "largest_difference": max(differences),
        "samples": [[round(value, 1) for value in sample] for sample in samples[:: max(1, len(samples) // 200)]],
    }
    gates = [
        Gate("difference of what two tenants were served, over its bound", max(differences) / limit, 1.0),
        Gate("1 - Jain's index of two tenants", 1 - jain, 1 - LEAST_JAIN),
    ]
    return PartResult(figures, gates)


async def _run(engine: AsyncEngine, base: Base, plan: Plan) -> list[Sample]:
    many = Asked(tenant="many", prompt=plan.many_prompt, output=plan.many_output)
    few = Asked(tenant="few", prompt=plan.few_prompt, output=plan.few_output)

    async def again(asked: Asked) -> None:
        while True:
            await ask(engine, base, asked)

    tasks = [asyncio.create_task(again(many)) for _ in range(plan.many_requests)]
    tasks += [asyncio.create_task(again(few)) for _ in range(plan.few_streams + plan.rows)]
    samples: list[Sample] = []
    begin_s = time.perf_counter()
    base_line: tuple[float, float] | None = None
    while (now_s := time.perf_counter() - begin_s) < plan.share_s:
        served = engine.served()
        if {"many", "few"} <= served.keys():
            base_line = base_line or (served["many"], served["few"])
            samples.append((now_s, served["many"] - base_line[0], served["few"] - base_line[1]))
        await asyncio.sleep(SAMPLE_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return samples


def plot(samples: Sequence[Sample], limit: float, out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    at_s = [sample[0] for sample in samples]
    left.plot(at_s, [sample[1] for sample in samples], color="#0072b2", label="fifty times the requests, long prompts")
    left.plot(at_s, [sample[2] for sample in samples], color="#d55e00", label="short prompts")
    left.set(xlabel="seconds", ylabel="served, in prompt tokens", title="Two tenants that always want more")
    left.legend()
    right.plot(at_s, [sample[1] - sample[2] for sample in samples], color="#009e73", label="difference")
    for sign in (-1, 1):
        right.axhline(sign * limit, color="#999999", linestyle="--", label="bound" if sign > 0 else None)
    right.set(xlabel="seconds", ylabel="prompt tokens", title="What one was served more")
    right.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
