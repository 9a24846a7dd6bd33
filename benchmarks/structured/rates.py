"""Tokens a second with schemas and without, of one engine."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from benchmarks.structured.plan import Plan
from benchmarks.structured.schemas import schema
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.request import GenerationRequest, Prompt, SamplingParams, StoppingParams, StructuredOutput
from gralora_runtime.stream import merge_deltas

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
Answers = list[tuple[int, ...]]  # the token ids of each


async def rates(engine: AsyncEngine, plan: Plan) -> tuple[dict[str, list[float]], Answers]:
    """Tokens a second of each round, and the answers of the last one with schemas."""
    found: dict[str, list[float]] = {"free": [], "structured": []}
    answers: Answers = []
    for is_structured in (False, True):  # compiles kernels
        await _round(engine, plan, is_structured=is_structured)
    for _ in range(plan.rounds):
        for kind, of_kind in found.items():
            began_s = time.perf_counter()
            answers = await _round(engine, plan, is_structured=kind == "structured")
            of_kind.append(round(sum(map(len, answers)) / (time.perf_counter() - began_s), 2))
    return found, answers


async def _round(engine: AsyncEngine, plan: Plan, *, is_structured: bool) -> Answers:
    outputs = [
        StructuredOutput(json_schema=schema(number)) if is_structured else None for number in range(plan.requests)
    ]
    return await asyncio.gather(*(_ask(engine, plan, number, output) for number, output in enumerate(outputs)))


async def _ask(engine: AsyncEngine, plan: Plan, number: int, output: StructuredOutput | None) -> tuple[int, ...]:
    names = sorted(folder.name for folder in ADAPTERS.iterdir())
    stream = await engine.submit(
        GenerationRequest(
            request_id=f"{number}",
            prompt=Prompt(token_ids=tuple(1000 + 37 * number + 11 * place for place in range(plan.prompt))),
            adapter=names[number % len(names)],
            sampling=SamplingParams(temperature=0.8, seed=number),
            stopping=StoppingParams(max_tokens=plan.tokens, ignore_eos=True),
            structured_output=output,
        )
    )
    return merge_deltas([delta async for delta in stream]).token_ids
