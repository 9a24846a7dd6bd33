"""`python -m benchmarks.faults`: what clients see of each fault, how long it lasts, what is lost. Writes JSON.

Fails if something was lost or went wrong. The same faults, over a tiny model, are tests/e2e/test_faults.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.catalogue.base import base_of, save_tiny_llama
from benchmarks.faults.everything import EVERYTHING
from benchmarks.faults.fault import Fault, Outcome
from benchmarks.faults.stage import Stage
from benchmarks.machine import busy_share, facts
from gralora_server.cli.model import default_model

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.faults", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="over a tiny model")
    parser.add_argument("--only", default="", help="names with commas between; default: all")
    parser.add_argument("--json", type=Path, default=RESULTS / "faults.json", help="where to write the result")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [fault.name for fault in EVERYTHING]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    before = {"machine": facts(), "busy_share_before": busy_share()}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        path = save_tiny_llama(Path(folder) / "model") if options.tiny else default_model()
        base = base_of(path.name, path)
        found = {}
        for fault in EVERYTHING:
            if fault.name in wanted:
                stage = Stage(base, Path(folder) / fault.name)
                stage.folder.mkdir()
                stage.write_adapters()
                found[fault.name] = fault.run(stage)
    written = {
        name: {part.name: getattr(outcome, part.name) for part in fields(outcome)} for name, outcome in found.items()
    }
    options.json.write_text(json.dumps(before | {"model": base.name, "faults": written}, indent=1) + "\n")
    show({fault: found[fault.name] for fault in EVERYTHING if fault.name in found})
    sys.exit(any(not outcome.is_good for outcome in found.values()))


def show(found: Mapping[Fault, Outcome]) -> None:
    table = Table("fault", "what happens", "clients saw", "recovered, s", "lost", "problems")
    for fault, outcome in found.items():
        saw = ", ".join(f"{count} {how}" for how, count in outcome.saw.items())
        lost, problems = ("; ".join(texts) or "nothing" for texts in (outcome.lost, outcome.problems))
        table.add_row(fault.name, fault.happens, saw, f"{outcome.recovered_s:.2f}", lost, problems)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
