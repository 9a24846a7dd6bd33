"""`python -m benchmarks.overload`: ten times what the server can do, by users with deadlines who come again when told.

First single rates, to know the best goodput; then the best one, ten times as much, and the best again. Everything is
`gralora loadtest` against a server of its own, on the same cores. Writes JSON; fails if a gate does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.catalogue.gate import Gate
from benchmarks.machine import busy_share, facts
from gralora_server.loadtest.overload import Bin
from gralora_server.loadtest.result import RunResult

RESULTS = Path(__file__).parent / "results"
TIMES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Seconds, tokens and requests a second as the names say."""

    rates: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0)
    rate_s: float = 40.0
    before_s: float = 40.0
    peak_s: float = 300.0
    after_s: float = 40.0
    deadline_s: float = 2.0
    retries: int = 3
    prompt: int = 64
    output: int = 16


QUICK = Plan(rates=(2.0,), rate_s=8.0, before_s=8.0, peak_s=15.0, after_s=10.0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.overload", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute of it; judges nothing")
    parser.add_argument("--json", type=Path, default=RESULTS / "overload.json", help="where to write the result")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    result: dict[str, Any] = {"machine": facts(), "busy_share_before": busy_share(), "plan": asdict(plan)}
    with tempfile.TemporaryDirectory(prefix="overload-") as folder:
        found, gates = measure(plan, Path(folder), options.json)
    result |= found | {"gates": [asdict(gate) | {"passed": gate.passed} for gate in gates]}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    show(gates)
    sys.exit(not options.quick and any(not gate.passed for gate in gates))


def measure(plan: Plan, folder: Path, out: Path) -> tuple[dict[str, Any], list[Gate]]:
    goodputs = {}
    for rate in plan.rates:
        run = _run(plan, folder / str(rate), f"poisson:{rate:g}", plan.rate_s)
        assert run.overload is not None
        goodputs[rate] = run.overload.total.good_requests_per_s
    best = max(goodputs, key=lambda rate: goodputs[rate])
    arrivals = f"step:{best:g},{plan.before_s:g},{TIMES * best:g},{plan.peak_s:g},{best:g},{plan.after_s:g}"
    report = folder / "peak"
    run = _run(plan, report, arrivals, plan.before_s + plan.peak_s + plan.after_s)
    for picture in report.glob("*.png"):
        if "overload" in picture.name or "time" in picture.name:
            (out.with_name(f"overload-{picture.name}")).write_bytes(picture.read_bytes())
    overload = run.overload
    assert overload is not None
    peak = [one for one in overload.bins if plan.before_s <= one.at_s < plan.before_s + plan.peak_s]
    total, recovery = overload.total, overload.recovery
    # In time by the call's own deadline: who was told to come again later had no answer in the meantime.
    outside = sum(one.good for one in overload.bins) - sum(one.good for one in peak)
    goodput = (total.in_time_once_let_in - outside) / plan.peak_s
    first_refusal_s = _first_refusal_s(overload.bins, total.first_refusal_s, plan.before_s)
    growth = _growth([one.memory_bytes for one in run.timeline if one.memory_bytes and _inside(one.at_s, plan)])
    recovered_s = recovery.after_s if recovery is not None and recovery.after_s is not None else float("inf")
    found = {
        "goodput_by_rate": goodputs,
        "rate": best,
        "peak_goodput": round(goodput, 3),
        "total": total.model_dump(mode="json"),
        "recovery": None if recovery is None else recovery.model_dump(mode="json"),
        "memory_growth": growth,
        "first_refusal_after_s": first_refusal_s,
    }
    gates = [
        Gate("the best rate's goodput over the peak's", goodputs[best] / max(goodput, 1e-9), 1 / 0.9, is_speed=True),
        Gate("seconds to the first refusal", first_refusal_s, 1.0, is_speed=True),
        Gate("growth of memory in the peak", growth, 0.05),
        Gate("wait until let in, over what was told, median", total.retries.wait_p50, 2.0, is_speed=True),
        Gate("seconds until service is normal again", recovered_s, 5.0, is_speed=True),
        Gate("refusals without a time, and failures", float(sum(total.errors.values())), 0.0),
    ]
    return found, gates


def _run(plan: Plan, out: Path, arrivals: str, duration_s: float) -> RunResult:
    command = [sys.executable, "-c", "from gralora_server.cli import main; main()", "loadtest", "--start"]
    command += [
        "--num-adapters",
        "0",
        "--arrivals",
        arrivals,
        "--duration-s",
        f"{duration_s:g}",
        "--warmup-s",
        "3",
        "--out",
        str(out),
    ]
    command += ["--prompt-tokens", str(plan.prompt), "--output-tokens", str(plan.output)]
    command += ["--deadline-s", f"{plan.deadline_s:g}", "--slo-ttft-s", f"{plan.deadline_s:g}"]
    command += ["--retries", str(plan.retries), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return RunResult.model_validate(json.loads((out / "result.json").read_text())["runs"][0])


def _inside(at_s: float, plan: Plan) -> bool:
    return plan.before_s <= at_s < plan.before_s + plan.peak_s


def _growth(sizes: Sequence[int]) -> float:
    """Of the last third over the middle one."""
    third = max(1, len(sizes) // 3)
    middle, last = statistics.median(sizes[third : 2 * third] or sizes), statistics.median(sizes[-third:])
    return round(last / middle - 1, 4)


def _first_refusal_s(bins: Sequence[Bin], first_s: float | None, peak_from_s: float) -> float:
    """After the peak began, to a second where somebody was refused before."""
    if first_s is not None and first_s >= peak_from_s:
        return round(first_s - peak_from_s, 3)
    inside = (one.at_s for one in bins if one.at_s >= peak_from_s and one.refusals)
    return next(inside, float("inf")) - peak_from_s


def show(gates: Sequence[Gate]) -> None:
    table = Table("gate", "found", "at most", "")
    for gate in gates:
        table.add_row(gate.name, f"{gate.found:.4g}", f"{gate.at_most:g}", "" if gate.passed else "FAILED")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
