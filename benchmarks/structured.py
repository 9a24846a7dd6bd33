"""`python -m benchmarks.structured`: what it costs that answers have to match something.

Sixteen requests at a time, for the example adapters in turn, each with a schema of its own that its tokens do not come
to the end of; and the same requests without one, so that all answers have the same length. Runs of both take turns, in
one engine in this process. Then alone: the masks of those answers, token by token, and compiling such schemas. Writes
JSON; fails if a gate does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.catalogue.gate import Gate
from benchmarks.machine import busy_share, facts
from gralora_runtime.assemble import assemble
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.request import GenerationRequest, Prompt, SamplingParams, StoppingParams, StructuredOutput
from gralora_runtime.stream import merge_deltas
from gralora_runtime.structured.compiler import Compiler
from gralora_runtime.structured.masks import fill
from gralora_runtime.structured.matcher import Matcher
from gralora_runtime.structured.vocabulary import Vocabulary
from gralora_server.model_fetch import ensure_default_model

RESULTS = Path(__file__).parent / "results"
ADAPTERS = Path(__file__).parent.parent / "examples" / "adapters"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    requests: int = 16  # at a time, each with its own schema
    tokens: int = 96  # of each answer
    prompt: int = 48  # tokens of each
    rounds: int = 5  # of both kinds
    compiled: int = 40  # schemas


QUICK = Plan(tokens=16, rounds=1, compiled=8)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.structured", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half a minute of it; judges no speed")
    parser.add_argument("--json", type=Path, default=RESULTS / "structured.json", help="where to write the result")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    result: dict[str, Any] = {"machine": facts(), "busy_share_before": busy_share(), "plan": asdict(plan)}
    options.json.parent.mkdir(parents=True, exist_ok=True)  # now, and not when all has been measured
    found, gates = asyncio.run(measure(plan, ensure_default_model()))
    result |= found | {"gates": [asdict(gate) | {"passed": gate.passed} for gate in gates]}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    show(gates)
    sys.exit(any(not gate.passed for gate in gates if not (options.quick and gate.is_speed)))


async def measure(plan: Plan, model: Path) -> tuple[dict[str, Any], list[Gate]]:
    config = EngineConfig(
        model=model, adapters=in_directory(ADAPTERS), device="cpu", max_num_seqs=plan.requests,
        kv_cache_bytes=512 << 20, enable_prefix_cache=False,
    )  # fmt: skip
    parts = assemble(config)
    engine = AsyncEngine(parts, config)
    try:
        rates, answers = await _rates(engine, plan)
    finally:
        await engine.close()
    began_s = time.perf_counter()
    vocabulary = Vocabulary(
        parts.base.tokenizer,
        eos_token_ids=parts.base.eos_token_ids,
        vocab_size=parts.info.vocab_size,
        num_threads=len(os.sched_getaffinity(0)),
    )
    vocabulary_s = time.perf_counter() - began_s
    compiler = Compiler(lambda: vocabulary)
    compile_s = await _compile_times(compiler, plan)
    mask_s = await _mask_times(compiler, answers)
    compiler.close()
    ratios = [free / bound for free, bound in zip(rates["free"], rates["structured"], strict=True)]
    compile_ms = _ms(statistics.median(compile_s))
    found = {
        "tokens_per_s": rates,
        "free_over_structured": ratios,
        "vocabulary_s": round(vocabulary_s, 4),
        "compile_ms": {"median": compile_ms, "most": _ms(max(compile_s))},
        "masks_ms_per_step": {"median": _ms(statistics.median(mask_s)), "most": _ms(max(mask_s))},
        "mask_us_per_token": round(1e6 * statistics.mean(mask_s) / plan.requests, 2),
    }
    gates = [
        Gate("rate without schemas over that with them, median", statistics.median(ratios), 1.1, is_speed=True),
        Gate("ms to compile a schema, median", compile_ms, 100.0, is_speed=True),
        Gate("answers that are shorter than they had to be", _too_short(answers, plan), 0.0),
    ]
    return found, gates


async def _rates(engine: AsyncEngine, plan: Plan) -> tuple[dict[str, list[float]], list[tuple[int, ...]]]:
    """Tokens a second of each round, and the answers of the last one with schemas."""
    rates: dict[str, list[float]] = {"free": [], "structured": []}
    answers: list[tuple[int, ...]] = []
    await asyncio.gather(*(_ask(engine, plan, number, None) for number in range(plan.requests)))  # compiles kernels
    await asyncio.gather(*(_ask(engine, plan, number, schema(number)) for number in range(plan.requests)))
    for _ in range(plan.rounds):
        for kind, of_kind in rates.items():
            began_s = time.perf_counter()
            schemas = [schema(number) if kind == "structured" else None for number in range(plan.requests)]
            answers = await asyncio.gather(*(_ask(engine, plan, number, one) for number, one in enumerate(schemas)))
            of_kind.append(round(sum(map(len, answers)) / (time.perf_counter() - began_s), 2))
    return rates, answers


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


def schema(number: int) -> StructuredOutput:
    """Of a list that is longer than any answer of ours."""
    properties = {
        f"name_{number}": {"type": "string", "maxLength": 20},
        f"count_{number}": {"type": "integer", "minimum": 0, "maximum": 1000 + number},
        "colour": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    }
    item = {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip
    return StructuredOutput(json_schema=json.dumps({"type": "array", "items": item, "minItems": 100}))


async def _compile_times(compiler: Compiler, plan: Plan) -> list[float]:
    """Seconds, of schemas that nobody has asked for before."""
    found = []
    await compiler.compile(schema(999))
    for number in range(1000, 1000 + plan.compiled):
        began_s = time.perf_counter()
        await compiler.compile(schema(number))
        found.append(time.perf_counter() - began_s)
    return found


async def _mask_times(compiler: Compiler, answers: Sequence[tuple[int, ...]]) -> list[float]:
    """Seconds of each step, in which the masks of all these answers are filled."""
    stopping = StoppingParams(ignore_eos=True)
    matchers = [Matcher(await compiler.compile(schema(number)), stopping) for number in range(len(answers))]
    found = []
    for tokens in zip(*answers, strict=True):
        began_s = time.perf_counter()
        fill(matchers)
        found.append(time.perf_counter() - began_s)
        for matcher, token in zip(matchers, tokens, strict=True):
            matcher.advance(token)
    return found


def _too_short(answers: Sequence[tuple[int, ...]], plan: Plan) -> float:
    return float(sum(len(tokens) != plan.tokens for tokens in answers))


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def show(gates: Sequence[Gate]) -> None:
    table = Table("gate", "found", "at most", "")
    for gate in gates:
        table.add_row(gate.name, f"{gate.found:.4g}", f"{gate.at_most:g}", "" if gate.passed else "FAILED")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
