"""`python -m benchmarks.overload`: ten times what the server can do, by users with deadlines.

First single rates, to know the best goodput; then half of the best one, ten times the best, and half of it again. Then
a shorter peak of users who come again when told: in the long one there are none, or it would not end when it ends. All
whom that one leaves have to be served before its run ends.
Everything is `gralora loadtest` against a server of its own, on the same cores. Writes JSON; fails if a gate does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.catalogue.gate import Gate, show
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
    retries: int = 3  # in the second peak
    retried_peak_s: float = 15.0
    retried_after_s: float = 240.0
    kv_cache: str = "256MiB"  # little, so that all of it has been written long before the peak ends
    prompt: int = 64
    output: int = 16


QUICK = Plan(
    rates=(3.0,), rate_s=12.0, before_s=12.0, peak_s=15.0, after_s=10.0, retried_peak_s=5.0, retried_after_s=30.0
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.overload", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute of it; judges nothing")
    parser.add_argument("--json", type=Path, default=RESULTS / "overload.json", help="where to write the result")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    result: dict[str, Any] = {"machine": facts(), "busy_share_before": busy_share(), "plan": asdict(plan)}
    options.json.parent.mkdir(parents=True, exist_ok=True)  # now, and not when all has been measured
    with tempfile.TemporaryDirectory(prefix="overload-") as folder:
        found, gates = measure(plan, Path(folder), options.json)
    result |= found | {"gates": [asdict(gate) | {"passed": gate.passed} for gate in gates]}
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
    run = _run(
        plan, folder / "peak", _peak(plan, best, plan.peak_s, plan.after_s), plan.before_s + plan.peak_s + plan.after_s
    )
    for picture in (folder / "peak").glob("overload*.png"):
        out.with_name(picture.name).write_bytes(picture.read_bytes())
    again = _run(
        plan,
        folder / "again",
        _peak(plan, best, plan.retried_peak_s, plan.retried_after_s),
        plan.before_s + plan.retried_peak_s + plan.retried_after_s,
        retries=plan.retries,
    )
    overload, retried = run.overload, again.overload
    assert overload is not None
    assert retried is not None
    total, recovery, retries = overload.total, overload.recovery, retried.total.retries
    peak = [one for one in overload.bins if _inside(one.at_s, plan)]
    goodput = sum(one.good for one in peak) / plan.peak_s
    first_refusal_s = _first_refusal_s(overload.bins, total.first_refusal_s, plan.before_s)
    growth = _growth([one.memory_bytes for one in run.timeline if one.memory_bytes and _inside(one.at_s, plan)])
    recovered_s = recovery.after_s if recovery is not None and recovery.after_s is not None else float("inf")
    failures = sum(count for status, count in total.errors.items() if status != "UNFINISHED")  # the run's own end
    found = {
        "goodput_by_rate": goodputs,
        "rate": best,
        "peak_goodput": round(goodput, 3),
        "total": total.model_dump(mode="json"),
        "retried": retried.total.model_dump(mode="json"),
        "recovery": None if recovery is None else recovery.model_dump(mode="json"),
        "memory_growth": growth,
        "first_refusal_after_s": first_refusal_s,
    }
    gates = [
        Gate("the best rate's goodput over the peak's", goodputs[best] / max(goodput, 1e-9), 1 / 0.9, is_speed=True),
        Gate("seconds to the first refusal", first_refusal_s, 1.0, is_speed=True),
        Gate("growth of memory in the peak", growth, 0.05),
        Gate("wait until let in, over what was told, median", retries.wait_p50, 2.0, is_speed=True),
        Gate("seconds until service is normal again", recovered_s, 5.0, is_speed=True),
        Gate("failures that are no typed refusal", float(failures), 0.0),
    ]
    return found, gates


def _peak(plan: Plan, best: float, peak_s: float, after_s: float) -> str:
    quiet = f"{best / 2:g}"
    return f"step:{quiet},{plan.before_s:g},{TIMES * best:g},{peak_s:g},{quiet},{after_s:g}"


def _run(plan: Plan, out: Path, arrivals: str, duration_s: float, *, retries: int = 0) -> RunResult:
    command = [sys.executable, "-c", "from gralora_server.cli import main; main()", "loadtest", "--start"]
    command += ["--num-adapters", "0", "--arrivals", arrivals, "--duration-s", f"{duration_s:g}", "--warmup-s", "3"]
    command += ["--prompt-tokens", str(plan.prompt), "--output-tokens", str(plan.output), "--out", str(out)]
    command += ["--deadline-s", f"{plan.deadline_s:g}", "--slo-ttft-s", f"{plan.deadline_s:g}"]
    command += ["--retries", str(retries), "--json"]
    environment = os.environ | {"GRALORA_MEMORY_KV_CACHE_BYTES": plan.kv_cache}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
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


if __name__ == "__main__":
    main()
