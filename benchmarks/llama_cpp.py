"""`python -m benchmarks.llama_cpp`: one stream by our engine, weights in blocks as GGUF has them, beside llama.cpp's.

Both over the default model's Q4_1 in one process, by turns, with the same threads: decode steps of 1 row, and a prompt.
llama.cpp comes as `xllamacpp`, which has to be installed for it. Writes JSON; fails if a gate does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.catalogue.gate import Gate, show
from benchmarks.machine import busy_share, facts
from benchmarks.own_engine import OwnEngine
from benchmarks.weights import KV_BYTES, POOL_BYTES
from benchmarks.workload import Request, make_prompts, make_requests
from gralora_runtime.config import AS_SAVED
from gralora_server.model_fetch import ensure_default_model
from gralora_server.model_source import SMOLLM2, installed_gguf

RESULTS = Path(__file__).parent / "results"
PACKAGE = "xllamacpp"
PROMPT, TOKENS, ROUNDS = 64, 64, 7
MARGIN_TOKENS = 64  # of llama.cpp's context, beside prompt and answer
LEAST = 1.25  # times as many tokens a second as llama.cpp
OURS, THEIRS = "this engine, blocks", "llama.cpp, Q4_1"
STEP, FIRST = "a step of 1, ms", "a prompt, ms"

Times = dict[str, list[float]]  # milliseconds of each round, by what was measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.llama_cpp", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "llama_cpp.json", help="where to write the result")
    options = parser.parse_args()
    if find_spec(PACKAGE) is None:
        parser.error(f"{PACKAGE} is not installed")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": facts(), "busy_share_before": busy_share(), PACKAGE: version(PACKAGE)}
    times = measure()
    gate = Gate("a step over llama.cpp's", median(times, OURS, STEP) / median(times, THEIRS, STEP), 1 / LEAST)
    result |= {"prompt": PROMPT, "tokens": TOKENS, "times": times, "gate": asdict(gate) | {"passed": gate.passed}}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    show_times(times)
    show([gate])
    sys.exit(not gate.passed)


def measure() -> dict[str, Times]:
    """The first round warms up and does not count."""
    threads = len(os.sched_getaffinity(0))
    engine = OwnEngine(
        ensure_default_model(), max_num_seqs=1, adapter_pool_bytes=POOL_BYTES, kv_cache_bytes=KV_BYTES, weights=AS_SAVED
    )
    server = llama_cpp(threads)
    (request,) = make_requests(make_prompts(1, PROMPT, engine.parts.info.vocab_size), [""], TOKENS)
    times: dict[str, Times] = {OURS: {STEP: [], FIRST: []}, THEIRS: {STEP: [], FIRST: []}}
    try:
        for number in range(ROUNDS + 1):
            found = {OURS: of_ours(engine, request), THEIRS: of_theirs(server, request)}
            for name, (step_ms, first_ms) in found.items():
                if number:
                    times[name][STEP].append(step_ms)
                    times[name][FIRST].append(first_ms)
    finally:
        engine.close()
    return times


def llama_cpp(threads: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(installed_gguf(SMOLLM2))
    params.n_ctx = PROMPT + TOKENS + MARGIN_TOKENS
    params.n_parallel = 1
    params.verbosity = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def of_ours(engine: OwnEngine, request: Request) -> tuple[float, float]:
    run = engine.run([request])
    assert run.decode_step_s is not None
    return 1e3 * run.decode_step_s, 1e3 * run.ttft_s[0]


def of_theirs(server: Any, request: Request) -> tuple[float, float]:
    """By its own clock, which has nothing of what is around it."""
    asked = {"prompt": list(request.prompt), "n_predict": TOKENS, "temperature": 0.0, "ignore_eos": True}
    timings = server.handle_completions(asked | {"cache_prompt": False})["timings"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (PROMPT, TOKENS), timings
    return float(timings["predicted_ms"]) / (TOKENS - 1), float(timings["prompt_ms"])


def median(times: Mapping[str, Mapping[str, Sequence[float]]], whose: str, what: str) -> float:
    return statistics.median(times[whose][what])


def show_times(times: Mapping[str, Times]) -> None:
    table = Table("", *times)
    for what in (STEP, FIRST):
        table.add_row(what, *(f"{median(times, name, what):.2f}" for name in times))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
