"""`python -m benchmarks.tenants`: is the engine shared fairly, and at what price. Writes JSON; fails if a gate does."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.catalogue.__main__ import RESULTS, judged, show
from benchmarks.catalogue.base import Base, base_of, save_tiny_llama
from benchmarks.catalogue.gate import PartResult
from benchmarks.machine import busy_share, facts
from benchmarks.tenants.flood import flood
from benchmarks.tenants.plan import QUICK, Plan
from benchmarks.tenants.price import price
from benchmarks.tenants.share import share
from gralora_server.cli.model import default_model

PARTS = ("share", "flood", "price")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.tenants", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little of everything, over a tiny model; judges no speed")
    parser.add_argument("--only", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--json", type=Path, default=RESULTS / "tenants.json", help="where to write the result")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    result: dict[str, Any] = {"machine": facts(), "busy_share_before": busy_share(), "quick": options.quick}
    with tempfile.TemporaryDirectory(prefix="tenants-") as folder:
        base = _base(Path(folder), tiny=options.quick)
        found = asyncio.run(_run(base, plan, options.only or PARTS, options.json.with_name("tenants-share.png")))
    result |= {"model": base.name, "plan": asdict(plan)}
    result["parts"] = {
        name: {"gates": [asdict(gate) | {"passed": gate.passed} for gate in part.gates], **part.figures}
        for name, part in found.items()
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    show(found)
    sys.exit(
        any(not gate.passed for part in found.values() for gate in part.gates if judged(gate.is_speed, options.quick))
    )


async def _run(base: Base, plan: Plan, names: list[str] | tuple[str, ...], picture: Path) -> dict[str, PartResult]:
    parts = {
        "share": lambda: share(base, plan, picture),
        "flood": lambda: flood(base, plan),
        "price": lambda: price(base, plan),
    }
    return {name: await parts[name]() for name in PARTS if name in names}


def _base(folder: Path, *, tiny: bool) -> Base:
    if tiny:
        return base_of("a tiny random Llama", save_tiny_llama(folder / "model"))
    path = default_model()
    return base_of(path.name, path)


if __name__ == "__main__":
    main()
