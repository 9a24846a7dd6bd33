"""`python -m benchmarks.llama_cpp`: one stream by our engine, weights in blocks as GGUF has them, beside llama.cpp's.

Both over the default model's Q4_1 with the same threads: decode steps of 1 row, and a prompt. Each in processes of its
own, which take turns: in one process the threads of one wait for work while the other computes, which cost llama.cpp
two thirds of its speed. It comes as `xllamacpp`, which has to be installed. Writes JSON; fails if a gate does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
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
PROMPT, TOKENS = 64, 64
TURNS, REQUESTS = 3, 5  # processes of each, and what each of them measures after one request more
VOCAB = 49_152
MARGIN_TOKENS = 64  # of llama.cpp's context, beside prompt and answer
LEAST = 1.25  # times as many tokens a second as llama.cpp
OURS, THEIRS = "this engine, blocks", "llama.cpp, Q4_1"
STEP, FIRST = "a step of 1, ms", "a prompt, ms"

Times = dict[str, list[float]]  # milliseconds of each round, by what was measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.llama_cpp", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "llama_cpp.json", help="where to write the result")
    parser.add_argument("--only", choices=MEASURED, help=argparse.SUPPRESS)  # a turn of one of them
    options = parser.parse_args()
    if find_spec(PACKAGE) is None:
        parser.error(f"{PACKAGE} is not installed")
    if options.only is not None:
        print(json.dumps(MEASURED[options.only]()))
        return
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": facts(), "busy_share_before": busy_share(), PACKAGE: version(PACKAGE)}
    times = by_turns()
    gate = Gate("a step over llama.cpp's", median(times, OURS, STEP) / median(times, THEIRS, STEP), 1 / LEAST)
    result |= {"prompt": PROMPT, "tokens": TOKENS, "times": times, "gate": asdict(gate) | {"passed": gate.passed}}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    show_times(times)
    show([gate])
    sys.exit(not gate.passed)


def by_turns() -> dict[str, Times]:
    ensure_default_model()  # or the first turn would make it
    times: dict[str, Times] = {name: {STEP: [], FIRST: []} for name in MEASURED}
    for _ in range(TURNS):
        for name, own in times.items():
            command = [sys.executable, "-m", "benchmarks.llama_cpp", "--only", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            for what, found in json.loads(done.stdout.splitlines()[-1]).items():
                own[what] += found
    return times


def ours() -> Times:
    engine = OwnEngine(
        ensure_default_model(), max_num_seqs=1, adapter_pool_bytes=POOL_BYTES, kv_cache_bytes=KV_BYTES, weights=AS_SAVED
    )
    try:
        return measured(lambda request: of_ours(engine, request))
    finally:
        engine.close()


def theirs() -> Times:
    server = llama_cpp(len(os.sched_getaffinity(0)))
    return measured(lambda request: of_theirs(server, request))


def measured(run: Callable[[Request], tuple[float, float]]) -> Times:
    """The first request warms up and does not count."""
    (request,) = make_requests(make_prompts(1, PROMPT, VOCAB), [""], TOKENS)
    found = [run(request) for _ in range(REQUESTS + 1)][1:]
    return {STEP: [step_ms for step_ms, _ in found], FIRST: [first_ms for _, first_ms in found]}


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


MEASURED = {OURS: ours, THEIRS: theirs}

if __name__ == "__main__":
    main()
