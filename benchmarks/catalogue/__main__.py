"""`python -m benchmarks.catalogue`: thousands of adapters over one base model. Writes JSON; fails if a gate does."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.catalogue.base import Base, base_of, save_tiny_llama
from benchmarks.catalogue.content import Contents
from benchmarks.catalogue.fleet import Fleet, make_fleet
from benchmarks.catalogue.gaps import gaps
from benchmarks.catalogue.gate import PartResult
from benchmarks.catalogue.plan import QUICK, Plan
from benchmarks.catalogue.soak import soak
from benchmarks.catalogue.start import start
from benchmarks.machine import busy_share, facts
from gralora_server.cli.model import default_model

PARTS = ("start", "gaps", "soak")  # the last one changes the adapters
RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    """Prints a table of the gates and writes JSON where asked."""
    parser = argparse.ArgumentParser(prog="benchmarks.catalogue", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little of everything, over a tiny model; judges no speed")
    parser.add_argument("--only", type=_parts, default=PARTS, help=",".join(PARTS))
    parser.add_argument("--minutes", type=float, help="of the soak; default: 10")
    parser.add_argument("--adapters", type=int, help="default: 5000")
    parser.add_argument("--tiny", action="store_true", help="over a tiny model, whatever else")
    parser.add_argument("--seed", type=int, default=0, help="of the soak's traffic and changes")
    parser.add_argument("--json", type=Path, default=RESULTS / "catalogue.json", help="where to write the result")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    plan = replace(plan, minutes=options.minutes or plan.minutes, adapters=options.adapters or plan.adapters)
    result: dict[str, Any] = {"machine": facts(), "busy_share_before": busy_share(), "quick": options.quick}
    with tempfile.TemporaryDirectory(prefix="catalogue-") as folder:
        base = _base(Path(folder), tiny=options.tiny or options.quick)
        result |= {"model": base.name, "seed": options.seed, "plan": asdict(plan)}
        picture = options.json.with_name("catalogue-memory.png")
        parts = Parts(base=base, plan=plan, folder=Path(folder), seed=options.seed, picture=picture)
        found = parts.run(options.only)
    result["parts"] = {name: _written(part) for name, part in found.items()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    show(found)
    failed = any(
        not gate.passed for part in found.values() for gate in part.gates if judged(gate.is_speed, options.quick)
    )
    sys.exit(failed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What all parts are given."""

    base: Base
    plan: Plan
    folder: Path  # empty, and gone afterwards
    seed: int
    picture: Path

    def run(self, names: Sequence[str]) -> dict[str, PartResult]:
        """In the order of `PARTS`."""
        wants_fleet = {"start", "soak"} & set(names)
        fleet = make_fleet(Contents(self.base), self.folder, self.plan.adapters) if wants_fleet else None
        return {name: self._one(name, fleet) for name in PARTS if name in names}

    def _one(self, name: str, fleet: Fleet | None) -> PartResult:
        inside = self.folder / name
        inside.mkdir()
        if name == "gaps":
            return gaps(self.base, self.plan, inside)
        assert fleet is not None
        if name == "start":
            return start(fleet, self.plan, inside)
        return soak(fleet, self.plan, inside, seed=self.seed, picture=self.picture)


def judged(is_speed: bool, quick: bool) -> bool:
    return not (quick and is_speed)


def show(found: dict[str, PartResult]) -> None:
    table = Table("part", "gate", "found", "at most", "")
    for name, part in found.items():
        for gate in part.gates:
            table.add_row(name, gate.name, f"{gate.found:.4g}", f"{gate.at_most:g}", "" if gate.passed else "FAILED")
    Console(width=120).print(table)


def _base(folder: Path, *, tiny: bool) -> Base:
    if tiny:
        return base_of("a tiny random Llama", save_tiny_llama(folder / "model"))
    path = default_model()
    return base_of(path.name, path)


def _written(part: PartResult) -> dict[str, Any]:
    return {"gates": [asdict(gate) | {"passed": gate.passed} for gate in part.gates], **part.figures}


def _parts(text: str) -> tuple[str, ...]:
    wanted = tuple(text.split(","))
    if unknown := set(wanted) - set(PARTS):
        raise argparse.ArgumentTypeError(f"there is no part {', '.join(sorted(unknown))}: {', '.join(PARTS)}")
    return wanted


if __name__ == "__main__":
    main()
