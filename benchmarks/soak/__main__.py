"""`python -m benchmarks.soak`: an hour at 70 % of what the server can do, while adapters and settings change.

Every answer is compared with what its content answers alone. Writes JSON and a plot; fails if a gate does. An interrupt
ends it early: what was had by then is judged.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.catalogue.__main__ import judged, show
from benchmarks.catalogue.base import base_of, save_tiny_llama
from benchmarks.catalogue.churn import Churn
from benchmarks.catalogue.content import Contents
from benchmarks.catalogue.fleet import make_fleet
from benchmarks.catalogue.gate import PartResult
from benchmarks.machine import busy_share, facts
from benchmarks.soak.customers import command, write_configuration
from benchmarks.soak.picture import plot
from benchmarks.soak.plan import TINY, Plan
from benchmarks.soak.run import observe
from benchmarks.soak.traffic import MAX_MODEL_LEN
from benchmarks.soak.verdict import judge
from gralora_server.cli.model import default_model
from gralora_server.loadtest.local_server import running

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="two minutes over a tiny model; judges no speed")
    parser.add_argument("--minutes", type=float, help="default: 60")
    parser.add_argument("--seed", type=int, default=0, help="of traffic and changes")
    parser.add_argument("--json", type=Path, default=RESULTS / "soak.json", help="where to write the result")
    options = parser.parse_args()
    plan = TINY if options.tiny else Plan()
    plan = replace(plan, minutes=options.minutes or plan.minutes)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    written: dict[str, Any] = {"machine": facts(), "busy_share_before": busy_share(), "plan": asdict(plan)}
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        path = save_tiny_llama(Path(folder) / "model") if options.tiny else default_model()
        written |= {"model": "a tiny random Llama" if options.tiny else path.name, "seed": options.seed}
        found = soak(path, plan, Path(folder), seed=options.seed)
    gates = [asdict(gate) | {"passed": gate.passed} for gate in found.gates]
    options.json.write_text(json.dumps(written | {"gates": gates, **found.figures}, indent=1) + "\n")
    plot(found.figures, options.json.with_suffix(".png"))
    show({"soak": found})
    sys.exit(any(not gate.passed for gate in found.gates if judged(gate.is_speed, options.tiny)))


def soak(model: Path, plan: Plan, folder: Path, *, seed: int) -> PartResult:
    """`folder` is left with what was made."""
    fleet = make_fleet(Contents(base_of(model.name, model)), folder, plan.adapters)
    names = list(fleet.initial)
    random.Random(seed).shuffle(names)
    churn = Churn(fleet, names, seed, plan.pause_s)
    configuration = folder / "gralora.toml"
    write_configuration(configuration)
    with running(command(fleet, plan.room, folder, MAX_MODEL_LEN)) as server:
        observed = asyncio.run(observe(server, churn, plan, configuration, seed=seed))
    return judge(observed, churn, plan, folder)


if __name__ == "__main__":
    main()
