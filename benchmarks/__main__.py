"""`python -m benchmarks` measures, and writes result and report; with `--quick` it only shows that everything runs."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils import logging as transformers_logging

from benchmarks import report, sections
from benchmarks.bench import Bench
from benchmarks.gate import GateRedError
from benchmarks.machine import best_of, busy_share, facts, measure_rates
from benchmarks.record import Section
from benchmarks.workload import FULL, QUICK, Workload
from gralora_server.model_fetch import ensure_default_model

T = TypeVar("T")
HERE = Path(__file__).parent


def main() -> None:
    """Exit status 1 when the gate is red: then there is no result."""
    options = _options()
    workload = QUICK if options.quick else FULL
    out: Path = options.out or HERE / "results" / ("quick.json" if options.quick else "bench.json")
    target = out.parent / "quick" if options.quick else HERE
    for folder in (out.parent, target):  # now, not when a quarter of an hour has been spent
        folder.mkdir(exist_ok=True, parents=True)
    transformers_logging.disable_progress_bar()
    try:
        result = run(options.model or ensure_default_model(), workload, options.vllm_python)
    except GateRedError as red:
        sys.exit(f"the gate is red, no time is reported: {red}")
    result["quick"] = options.quick
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(report.write(result, target, notes=HERE / "NOTES.md", gpu_results=HERE / "results" / "gpu"))


def run(model_dir: Path, workload: Workload, vllm_python: str) -> dict[str, Any]:
    """Everything that the report is made of."""
    started = datetime.now(UTC)
    busy = busy_share()
    with tempfile.TemporaryDirectory(prefix="gralora-bench-") as folder:
        bench = _timed("preparing", lambda: Bench(model_dir, Path(folder), workload))
        try:
            measured = _sections(bench, vllm_python)
            isolation = _timed("isolation", lambda: sections.isolation(bench))
        finally:
            bench.close()
    return {
        "started": started.isoformat(timespec="seconds"),
        "duration_s": round((datetime.now(UTC) - started).total_seconds()),
        "machine": facts() | {"busy_share_before": busy},
        "workload": asdict(workload),
        "engine": asdict(bench.engine.parts.info),
        "rates": asdict(best_of(*(section.rates for section in measured if section.rates))),
        "gate": {
            "answers": bench.gate.num_checked,
            "ties": bench.gate.num_ties,
            "max_logit_gap": bench.gate.max_logit_gap,
        },
        "sections": [asdict(section) for section in measured],
        "memory": [asdict(memory) for memory in bench.memory],
        "skipped": [asdict(skipped) for skipped in bench.skipped],
        "isolation": isolation,
    }


def _sections(bench: Bench, vllm_python: str) -> list[Section]:
    works: dict[str, Callable[[], list[Section]]] = {
        "one request": lambda: [sections.one_request(bench)],
        "crowd": lambda: sections.crowd(bench, vllm_python),
        "many adapters": lambda: [sections.many_adapters(bench)],
        "steps": lambda: sections.steps(bench),
        "long prompt": lambda: [sections.long_prompt(bench)],
        "kernel": lambda: [sections.kernel(bench)],
        "wires": lambda: [sections.over_wires(bench)],
    }
    measured = []
    before = measure_rates(bench.workload.bandwidth_bytes)
    for what, work in works.items():
        found = _timed(what, work)
        after = measure_rates(bench.workload.bandwidth_bytes)
        measured += [replace(section, rates=best_of(before, after)) for section in found]
        before = after
    return measured


def _timed(what: str, work: Callable[[], T]) -> T:
    """Says what takes how long: a run takes minutes."""
    started_s = time.perf_counter()
    result = work()
    print(f"{what}: {time.perf_counter() - started_s:.0f} s", file=sys.stderr, flush=True)
    return result


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct, prepared once")
    parser.add_argument("--quick", action="store_true", help="one round of very little: no result, but it runs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/bench.json")
    parser.add_argument("--vllm-python", default=sys.executable, help="an interpreter that has vLLM")
    return parser.parse_args()


if __name__ == "__main__":
    main()
