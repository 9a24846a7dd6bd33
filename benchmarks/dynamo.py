"""`python -m benchmarks.dynamo`: what NVIDIA Dynamo costs in front of a server, beside that server's own HTTP and gRPC.

Sixteen streams for sixteen adapters: by gRPC and by HTTP to the server, and by HTTP to Dynamo's frontend, which reaches
the server through its sidecar. All processes share the cores, and the ways take turns. Writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bench import KV_CACHE_BYTES, Bench
from benchmarks.dynamo_processes import PYTHON, running, why_not
from benchmarks.gate import GateRedError
from benchmarks.machine import busy_share, facts
from benchmarks.measurement import Answer, Contender, Run
from benchmarks.record import FIRST_MEAN, STEP, WHOLE, Row
from benchmarks.sections import GRPC, HTTP
from benchmarks.serve import client, serving
from benchmarks.worker import Worker
from benchmarks.workload import FULL, QUICK, Request
from gralora_server.model_fetch import ensure_default_model

DYNAMO = "NVIDIA Dynamo's HTTP, in front of the same server"
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.dynamo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute of it; its numbers mean nothing")
    parser.add_argument("--python", type=Path, default=PYTHON, help="an interpreter that has Dynamo")
    parser.add_argument("--json", type=Path, default=RESULTS / "dynamo.json", help="where to write the result")
    options = parser.parse_args()
    if (reason := why_not(options.python)) is not None:
        parser.error(f"no Dynamo: {reason}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": facts(), "busy_share_before": busy_share()}
    with tempfile.TemporaryDirectory(prefix="dynamo-") as folder:
        bench = Bench(ensure_default_model(), Path(folder), QUICK if options.quick else FULL)
        try:
            rows = three_ways(bench, options.python, Path(folder) / "dynamo")
        finally:
            bench.close()
    summary = summarize(rows)
    result |= {"rows": [asdict(row) for row in rows], "summary": summary}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    show(summary)


def three_ways(bench: Bench, python: Path, folder: Path) -> list[Row]:
    requests = bench.requests(bench.by_k[bench.workload.k], bench.workload.crowd)
    with (
        serving(
            bench.model_dir,
            bench.adapters.folder,
            max_num_seqs=bench.workload.large_crowd,
            adapter_pool_bytes=bench.pool_bytes,
            kv_cache_bytes=KV_CACHE_BYTES,
            more=["--vllm-grpc"],
        ) as service,
        running(python, folder, [service.server.address]) as dynamo,
    ):
        dynamo.wait_until(lambda: dynamo.models() >= {request.adapter for request in requests})
        with client("benchmarks.http_client", dynamo.frontend, "dynamo") as through_dynamo:
            direct = service.http_client.answers(requests)
            return bench.measure(
                [
                    Contender(name=GRPC, run=lambda _: [service.grpc_client.run(requests)]),
                    Contender(name=HTTP, run=lambda _: [service.http_client.run(requests)]),
                    Contender(name=DYNAMO, run=lambda _: [as_direct(requests, through_dynamo, direct)]),
                ]
            )


def as_direct(requests: Sequence[Request], through_dynamo: Worker, direct: Sequence[dict[str, Any]]) -> Run:
    """Dynamo tells texts and no tokens: they are those of the server's own answers, whose texts have to be the same."""
    answers = []
    for request, told, own in zip(requests, through_dynamo.answers(requests), direct, strict=True):
        if told["text"] != own["text"]:
            raise GateRedError(f"{request.adapter}: Dynamo said {told['text']!r}, and the server {own['text']!r}")
        answers.append(Answer(request, tuple(own["tokens"]), tuple(told["times_s"])))
    return Run(tuple(answers))


def summarize(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Seconds, as medians; and by how much each way is later than gRPC, paired by round."""
    samples = {(row.contender, row.measure): row.samples_s for row in rows}
    return {
        way: {
            f"{measure}{suffix}": statistics.median(values)
            for measure in (STEP, FIRST_MEAN, WHOLE)
            for suffix, values in (
                ("", samples[way, measure]),
                (
                    ", later than gRPC",
                    [own - grpc for own, grpc in zip(samples[way, measure], samples[GRPC, measure], strict=True)],
                ),
            )
        }
        for way in (GRPC, HTTP, DYNAMO)
    }


def show(summary: dict[str, dict[str, float]]) -> None:
    """In milliseconds."""
    measures = list(summary[GRPC])
    table = Table("", *measures)
    for way, values in summary.items():
        table.add_row(way, *(f"{1000 * values[measure]:.2f}" for measure in measures))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
