"""Whether what a soak observed is good enough: every answer against its content's tokens, balances, slopes, drift."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.catalogue import truth
from benchmarks.catalogue.churn import Churn
from benchmarks.catalogue.gate import Gate, PartResult
from benchmarks.catalogue.soak import SHOWN, note_initial, shown, verdict_of
from benchmarks.soak import health
from benchmarks.soak.bills import bills, problems_of
from benchmarks.soak.plan import Plan
from benchmarks.soak.run import Observed
from benchmarks.soak.traffic import QUESTION, Sent
from gralora_server.loadtest.summary import percentile

# Prometheus's and SQLite's files come and go, and a thread pool grows up to its size when it is first needed.
SLACK = 8
SLOPE_PER_HOUR = 0.02  # of memory
GROWTH = 0.05  # of memory, where a run is too short for a slope: what one allocator's arena more or less makes
SHORT_MINUTES = 20.0
DRIFT = (
    1.25  # of the 99th percentile: a third of an hour has some thousand requests, of which ten times fifty are above
)
LOAD = (0.65, 0.75)


def judge(observed: Observed, churn: Churn, plan: Plan, folder: Path) -> PartResult:
    """After the fact."""
    sent = observed.sent
    note_initial([one.answer for one in sent], churn, folder)
    asked = {
        (churn.contents[one.answer.digest], one.answer.name)
        for one in sent
        if one.answer.tokens and one.answer.digest in churn.contents
    }
    expected = truth.expected_tokens(churn.fleet.contents, folder / "truth", asked, QUESTION)
    verdicts = [verdict(one, churn, expected) for one in sent]
    counts = Counter(verdicts)
    sample = dict(random.Random(0).sample(sorted(expected.items()), min(plan.peft_samples, len(expected))))
    unlike = truth.unlike_peft(churn.fleet.contents, folder, sample, QUESTION)
    billed = bills(sent, observed.usage, observed.page)
    odd = [*churn.problems, *observed.problems, *problems_of(billed)]
    unexpected = sum(count for how, count in counts.items() if "unexpected" in how)
    seconds = observed.ended_s - observed.begun_s
    open_loop = [one for one in sent if one.answer.sent_s >= observed.begun_s]
    load = len(open_loop) / seconds / observed.capacity_per_s
    minutes = _by_minute(open_loop, observed)
    figures: dict[str, Any] = {
        "minutes": round(seconds / 60, 2),
        "capacity_per_s": round(observed.capacity_per_s, 3),
        "load": round(load, 4),
        "requests": len(sent),
        "kinds": dict(sorted(Counter(one.kind for one in sent).items())),
        "verdicts": dict(sorted(counts.items())),
        "contents_answered": len(expected),
        "peft_compared": len(sample),
        "changes": dict(sorted(churn.counts.items())),
        "reloads": observed.reloads,
        "looks": observed.looks,
        "left": observed.left,
        "bills": {tenant: [bill.charged, bill.at_least, bill.at_most] for tenant, bill in billed.items()},
        "by_minute": minutes,
        "health": [
            [round(one.at_s, 1), one.memory_bytes >> 20, one.descriptors, one.threads] for one in observed.samples
        ],
        "memory_slope_per_hour": round(health.slope(observed.samples), 5),
        "problems": odd[:SHOWN],
        "examples": [
            shown(one.answer, how, churn)
            for one, how in zip(sent, verdicts, strict=True)
            if how in ("wrong", "stale") or "unexpected" in how
        ][:SHOWN],
    }
    is_short = seconds < 60 * SHORT_MINUTES
    gates = [
        Gate("wrong answers", counts["wrong"], 0),
        Gate("stale answers", counts["stale"], 0),
        Gate("unexpected errors, hung requests among them", unexpected, 0),
        Gate("what cannot be: acknowledgements, lists, bills", len(odd), 0),
        Gate("contents unlike PEFT", len(unlike), 0),
        Gate("left after unloading", sum(observed.left.values()), 0),
        Gate("descriptors more than before", observed.after.descriptors - observed.before.descriptors, SLACK),
        Gate("threads more than before", observed.after.threads - observed.before.threads, SLACK),
        Gate("growth of memory", health.growth(observed.samples), GROWTH)
        if is_short
        else Gate("slope of memory, share per hour", health.slope(observed.samples), SLOPE_PER_HOUR),
        Gate("refusals for a quota that there were not", float(not counts["error, meant: QUOTA_EXCEEDED"]), 0),
        Gate("drift of P99, first token", drift(open_loop, observed, "ttft_s"), DRIFT, is_speed=True),
        Gate("drift of P99, between tokens", drift(open_loop, observed, "itl_s"), DRIFT, is_speed=True),
        Gate("load, share of the capacity", load, LOAD[1], is_speed=True),
        Gate("load that was not there", LOAD[0] - load, 0, is_speed=True),
    ]
    return PartResult(figures, gates)


def verdict(one: Sent, churn: Churn, expected: Mapping[truth.Asked, truth.Tokens]) -> str:
    """As `verdict_of`, and "error, meant" where a customer has to hear one."""
    if one.answer.error and one.answer.error in one.meant:
        return f"error, meant: {one.answer.error}"
    if one.must_fail and not one.answer.error:
        return "wrong"
    return verdict_of(one.answer, churn, dict(expected))


def drift(sent: Sequence[Sent], observed: Observed, of: str) -> float:
    """Of the 99th percentile: the last third of the run over the first."""
    third = (observed.ended_s - observed.begun_s) / 3
    first, last = (
        [
            value
            for one in sent
            if start <= one.answer.sent_s < start + third and (value := getattr(one, of)) is not None
        ]
        for start in (observed.begun_s, observed.ended_s - third)
    )
    if not first or not last:
        return float("inf")
    return percentile(sorted(last), 99) / percentile(sorted(first), 99)


def _by_minute(sent: Sequence[Sent], observed: Observed) -> list[dict[str, float]]:
    """99th percentiles and counts, of the requests sent in each minute."""
    found = []
    minutes: dict[int, list[Sent]] = {}
    for one in sent:
        minutes.setdefault(int((one.answer.sent_s - observed.begun_s) / 60), []).append(one)
    for minute, own in sorted(minutes.items()):
        first, between = (
            sorted(value for one in own if (value := getattr(one, of)) is not None) for of in ("ttft_s", "itl_s")
        )
        found.append(
            {
                "minute": minute,
                "requests": len(own),
                "ttft_p50_s": round(statistics.median(first), 4) if first else 0.0,
                "ttft_p99_s": round(percentile(first, 99), 4) if first else 0.0,
                "itl_p99_s": round(percentile(between, 99), 4) if between else 0.0,
            }
        )
    return found
