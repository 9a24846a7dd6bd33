"""`python -m benchmarks.structured`: what it costs that answers have to match something.

Sixteen requests at a time, for the example adapters in turn, each with a schema of its own that its tokens do not come
to the end of; and the same requests without one, so that all answers have the same length. Runs of both take turns, in
one engine in this process. Then alone: the masks of those answers, token by token, compiling such schemas, and 500 that
others wrote; and the same in xgrammar, where that is installed. Writes JSON; fails if a gate does.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.catalogue.gate import Gate, show
from benchmarks.machine import busy_share, facts
from benchmarks.structured import ours, rival
from benchmarks.structured.figures import Tried, ms, summary
from benchmarks.structured.plan import QUICK, Plan
from benchmarks.structured.public import public_schemas
from benchmarks.structured.rates import ADAPTERS, Answers, rates
from benchmarks.structured.schemas import schema
from gralora_runtime.assemble import EngineParts, assemble
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.structured.compiler import Compiler
from gralora_runtime.structured.vocabulary import Vocabulary
from gralora_server.model_fetch import ensure_default_model

RESULTS = Path(__file__).parents[1] / "results"
FIRST_NEW = 1000  # number of a schema that nobody has asked for before


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
    schemas = public_schemas(plan.public)
    config = EngineConfig(
        model=model, adapters=in_directory(ADAPTERS), device="cpu", max_num_seqs=plan.requests,
        kv_cache_bytes=512 << 20, enable_prefix_cache=False,
    )  # fmt: skip
    parts = assemble(config)
    engine = AsyncEngine(parts, config)
    try:
        found, answers = await rates(engine, plan)
    finally:
        await engine.close()
    vocabulary, vocabulary_s = _vocabulary(parts)
    compiler = Compiler(lambda: vocabulary)
    fresh = [schema(number) for number in range(FIRST_NEW, FIRST_NEW + plan.compiled)]
    compiled_s = await ours.compile_times(compiler, fresh)
    masks_s = await ours.mask_times(compiler, answers)
    tried = await ours.try_public(compiler, schemas)
    compiler.close()
    ratios = [free / bound for free, bound in zip(found["free"], found["structured"], strict=True)]
    figures = {
        "tokens_per_s": found,
        "free_over_structured": ratios,
        "vocabulary_s": round(vocabulary_s, 4),
        "compile_ms": ms(compiled_s),
        "masks_ms_per_step": ms(masks_s),
        "mask_us_per_token": round(1e6 * statistics.mean(masks_s) / plan.requests, 2),
        "public": summary(tried),
        "xgrammar": rival.measure(model, parts.info.vocab_size, answers, fresh, schemas),
    }
    return figures, _gates(plan, ratios, compiled_s, tried, answers)


def _vocabulary(parts: EngineParts) -> tuple[Vocabulary, float]:
    """And the seconds that it takes to make it."""
    began_s = time.perf_counter()
    vocabulary = Vocabulary(
        parts.base.tokenizer,
        eos_token_ids=parts.base.eos_token_ids,
        vocab_size=parts.info.vocab_size,
        num_threads=len(os.sched_getaffinity(0)),
    )
    return vocabulary, time.perf_counter() - began_s


def _gates(
    plan: Plan, ratios: Sequence[float], compiled_s: Sequence[float], tried: Sequence[Tried], answers: Answers
) -> list[Gate]:
    rate = "rate without schemas over that with them, median"
    compiling = "ms to compile a schema, median"
    return [
        Gate(rate, statistics.median(ratios), 1.1, is_speed=True),
        Gate(compiling, ms(compiled_s)["median"], 100.0, is_speed=True),
        Gate("answers that are shorter than they had to be", sum(len(one) != plan.tokens for one in answers), 0.0),
        Gate("public schemas that were not tried", plan.public - len(tried), 0.0),
        Gate("public schemas that were neither compiled nor refused with a reason", _neither(tried), 0.0),
    ]


def _neither(tried: Sequence[Tried]) -> float:
    return float(sum(one.outcome not in ("compiled", "refused", "too long") for one in tried))


if __name__ == "__main__":
    main()
