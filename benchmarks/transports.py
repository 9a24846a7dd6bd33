"""`python -m benchmarks.transports`: what a server costs beside its engine, over gRPC and over HTTP.

Sixteen streams for sixteen adapters, the client in a process of its own on the same cores, all ways in turn. Writes
JSON; fails if a gate does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.catalogue.gate import Gate, show
from benchmarks.machine import busy_share, facts
from benchmarks.record import FIRST_MEAN, STEP, WHOLE, Section
from benchmarks.sections import GRPC, HTTP, over_wires
from benchmarks.workload import FULL, QUICK
from gralora_server.model_fetch import ensure_default_model

LEAST_RATE = 0.93  # of the engine's in process
LATER_S = 0.010
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.transports", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute of it; judges nothing")
    parser.add_argument("--json", type=Path, default=RESULTS / "transports.json", help="where to write the result")
    options = parser.parse_args()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": facts(), "busy_share_before": busy_share()}
    with tempfile.TemporaryDirectory(prefix="transports-") as folder:
        bench = Bench(ensure_default_model(), Path(folder), QUICK if options.quick else FULL)
        try:
            section = over_wires(bench)
        finally:
            bench.close()
    gates = judge(section)
    result |= {"section": asdict(section), "gates": [asdict(gate) | {"passed": gate.passed} for gate in gates]}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    show(gates)
    sys.exit(not options.quick and any(not gate.passed for gate in gates))


def judge(section: Section) -> list[Gate]:
    """Paired by round, as rounds differ more than transports do."""
    samples = {(row.contender, row.measure): row.samples_s for row in section.rows}
    (in_process,) = {row.contender for row in section.rows} - {GRPC, HTTP}

    def ratio(measure: str) -> float:
        pairs = zip(samples[HTTP, measure], samples[in_process, measure], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    later_s = statistics.median(
        http - grpc for http, grpc in zip(samples[HTTP, FIRST_MEAN], samples[GRPC, FIRST_MEAN], strict=True)
    )
    return [
        Gate("a decode step over HTTP, over one in process", ratio(STEP), 1 / LEAST_RATE, is_speed=True),
        Gate("a whole run over HTTP, over one in process", ratio(WHOLE), 1 / LEAST_RATE, is_speed=True),
        Gate("seconds by which HTTP's first token is later than gRPC's", later_s, LATER_S, is_speed=True),
    ]


if __name__ == "__main__":
    main()
