"""`python -m benchmarks.host`: what the host costs beside a GPU's step, in process and behind gRPC. It needs no GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.host import engine, service
from benchmarks.machine import busy_share, facts

ROWS = (16, 64, 128, 256)
STEP_MS = {256: 12.0}  # a GPU's step of so many rows takes longer; others: the option's
# streams, least tokens of a message, processes of clients
STREAMS = ((1, 1, 1), (16, 1, 1), (64, 1, 1), (128, 1, 1), (128, 4, 1), (128, 1, 2))


def main() -> None:
    """Prints a table each and writes JSON where asked."""
    parser = argparse.ArgumentParser(prog="benchmarks.host", description=__doc__)
    parser.add_argument("--step-ms", type=float, default=9.0, help="what the device takes for a step of up to 128 rows")
    parser.add_argument("--rows", type=_numbers, default=ROWS, help="16,64,128,256")
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken")
    parser.add_argument("--no-grpc", action="store_true", help="in process alone")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    console = Console(width=150)
    result: dict[str, Any] = {"machine": facts(), "busy_share_before": busy_share(), "T_ms": options.step_ms}
    result["rows"] = in_process(options.rows, options.step_ms, options.rounds)
    show(console, "In process", result["rows"])
    if not options.no_grpc:
        result["streams"] = through_grpc(options.step_ms, options.rounds)
        show(console, "Through gRPC", result["streams"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def in_process(rows: Sequence[int], step_ms: float, rounds: int) -> list[dict[str, Any]]:
    """Each number of rows, pipelined and not, adapters all distinct and by Zipf."""
    found = []
    for count in rows:
        taken_ms = STEP_MS.get(count, step_ms)
        for adapters, pipelined in (("distinct", True), ("distinct", False), ("zipf", True)):
            costs = [
                asdict(engine.measure(count, adapters, taken_ms / 1e3, pipelined=pipelined)) for _ in range(rounds)
            ]
            found.append({"step_ms": taken_ms, "pipeline": "on" if pipelined else "off"} | medians(costs))
    return found


def through_grpc(step_ms: float, rounds: int) -> list[dict[str, Any]]:
    """Streams of the real service; each stream has an adapter of its own."""
    return [
        medians(
            [
                asdict(service.measure(streams, step_ms / 1e3, min_tokens=least, client_processes=processes))
                for _ in range(rounds)
            ]
        )
        for streams, least, processes in STREAMS
    ]


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each number that differs; what is no number, or never differs, stays."""
    return {
        key: value if isinstance(value, str) else median(run[key] for run in runs) for key, value in runs[0].items()
    }


def show(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(*(name.replace("_", "\n") for name in rows[0]), title=title)
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
