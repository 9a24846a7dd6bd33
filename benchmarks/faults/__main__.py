"""`python -m benchmarks.faults`: what clients see of each fault, how long it lasts, what is lost. Writes JSON.

Fails if something was lost or went wrong. The same faults, over a tiny model, are tests/e2e/test_faults.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import SkipTest

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
        found: dict[str, Outcome] = {}
        written: dict[str, Any] = {}
        for fault in EVERYTHING:
            if fault.name not in wanted:
                continue
            stage = Stage(base, Path(folder) / fault.name)
            stage.folder.mkdir()
            stage.write_adapters()
            begun_s = time.monotonic()
            try:
                outcome = found[fault.name] = seen_of(fault, stage)
            except SkipTest as cause:
                written[fault.name] = {"skipped": str(cause)}
                continue
            parts = {part.name: getattr(outcome, part.name) for part in fields(outcome)}
            written[fault.name] = parts | {"took_s": round(time.monotonic() - begun_s, 1)}
            # Each time anew: whoever breaks this off has what was seen by then.
            options.json.write_text(json.dumps(before | {"model": base.name, "faults": written}, indent=1) + "\n")
    show({fault: found[fault.name] for fault in EVERYTHING if fault.name in found})
    sys.exit(any(not outcome.is_good for outcome in found.values()))


def seen_of(fault: Fault, stage: Stage) -> Outcome:
    """What was not foreseen is a problem of this fault; the others go on. Raises SkipTest where it cannot be done."""
    try:
        return fault.run(stage)
    except SkipTest:
        raise
    except Exception as cause:
        return Outcome(saw={}, recovered_s=0.0, problems=(f"{type(cause).__name__}: {cause}",))


def show(found: Mapping[Fault, Outcome]) -> None:
    table = Table("fault", "what happens", "clients saw", "recovered, s", "lost", "problems")
    for fault, outcome in found.items():
        saw = ", ".join(f"{count} {how}" for how, count in outcome.saw.items())
        lost, problems = ("; ".join(texts) or "nothing" for texts in (outcome.lost, outcome.problems))
        table.add_row(fault.name, fault.happens, saw, f"{outcome.recovered_s:.2f}", lost, problems)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
