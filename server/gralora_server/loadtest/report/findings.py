"""What a result says, in words: the answer first, then what to mistrust. Every figure comes from the result."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gralora_server.loadtest.result import LoadTestResult, Refusal, RunResult, ServerStory

SURVIVAL_SHARE = 0.9


def is_comparison(result: LoadTestResult) -> bool:
    return len({(run.system, run.num_adapters) for run in result.runs}) > 1


def systems(result: LoadTestResult) -> list[str]:
    """In the order of their first run."""
    return list(dict.fromkeys(run.system for run in result.runs))


def tried(result: LoadTestResult) -> list[str]:
    """All systems, also those that could never be run."""
    return list(dict.fromkeys([*systems(result), *(refusal.system for refusal in result.refusals)]))


@dataclass(frozen=True, slots=True)
class Point:
    """All runs of one system with one number of adapters: one, or several rounds."""

    num_adapters: int
    runs: tuple[RunResult, ...]

    def median(self, value: Callable[[RunResult], float]) -> float:
        return statistics.median(map(value, self.runs))

    def range(self, value: Callable[[RunResult], float]) -> tuple[float, float]:
        """Of the smallest and the largest."""
        return min(map(value, self.runs)), max(map(value, self.runs))

    @property
    def survived(self) -> bool:
        """In every round."""
        return all(map(survived, self.runs))


def curve(result: LoadTestResult, system: str) -> list[Point]:
    """The runs of one system, by number of adapters."""
    found: dict[int, list[RunResult]] = {}
    for run in result.runs:
        if run.system == system:
            found.setdefault(run.num_adapters, []).append(run)
    return [Point(count, tuple(found[count])) for count in sorted(found)]


def throughput(run: RunResult) -> float:
    """Tokens a second."""
    return run.summary.tokens_per_s


def row_name(result: LoadTestResult, run: RunResult) -> str:
    """The system, whose number of adapters stands beside it; the label where that would not tell two runs apart."""
    alike = [one for one in result.runs if (one.system, one.num_adapters) == (run.system, run.num_adapters)]
    return run.system if len(alike) == 1 and is_comparison(result) else run.summary.label


def survived(run: RunResult) -> bool:
    """No errors, and nearly everybody was served as promised."""
    return not failures(run) and run.summary.ok > 0 and run.summary.goodput_share >= SURVIVAL_SHARE


def answer(result: LoadTestResult) -> list[str]:
    """A sentence or two for who reads nothing else."""
    if not result.runs:
        return ["Nothing could be run."]
    return _comparison(result) if is_comparison(result) else _single(result.runs[0])


def _single(run: RunResult) -> list[str]:
    summary = run.summary
    slo = f"first token within {summary.slo.ttft_s:g} s, then at most {1000 * summary.slo.itl_s:g} ms a token"
    failed = sum(failures(run).values())
    errors = f"{failed} of {summary.requests} requests failed" if failed else "none failed"
    rates = f"{summary.requests_per_s:.2f} requests and {summary.tokens_per_s:.0f} tokens a second"
    half, most = seconds(summary.ttft_s.p50), seconds(summary.ttft_s.p99)
    gap = seconds(summary.itl_s.p99)
    met = f"{summary.goodput_share:.0%} of the requests met the objective ({slo})"
    return [
        f"{rates} for {run.num_adapters} adapters; {met}, {errors}.",
        f"Half of the first tokens came within {half}, 99 % within {most}.",
        f"Of the gaps between tokens, 99 % were within {gap}.",
    ]


def _comparison(result: LoadTestResult) -> list[str]:
    first, *others = systems(result)
    beside: dict[int, list[str]] = {}  # by number of adapters, the largest that both could run with
    for other in others:
        pairs = _pairs(curve(result, first), curve(result, other))
        if pairs:
            beside.setdefault(pairs[-1][0].num_adapters, []).append(_times(*pairs[-1]))
    ours = curve(result, first)
    said = [
        f"With {_adapters(one.num_adapters)}, {first} gives {_rate(one)}: {', '.join(beside[one.num_adapters])}."
        for one in reversed(ours)
        if one.num_adapters in beside
    ]
    if not said:  # one system alone
        said = [f"{first} gives {'; '.join(f'{_rate(one)} with {_adapters(one.num_adapters)}' for one in ours)}."]
    limits = [f"{system}: {_largest(result, system) or 'none'}" for system in tried(result)]
    return [*said, f"Largest number of adapters that was survived: {'; '.join(limits)}."]


def _rate(point: Point) -> str:
    rate, (low, high) = point.median(throughput), point.range(throughput)
    rounds = len(point.runs)
    return f"{rate:.0f} tokens a second" + (f" (median of {rounds}, {low:.0f} to {high:.0f})" if rounds > 1 else "")


def _times(ours: Point, theirs: Point) -> str:
    rate = theirs.median(throughput)
    times = f"{ours.median(throughput) / rate:.2g} times" if rate else "beside nothing at all from"
    return f"{times} {theirs.runs[0].system} ({rate:.0f})"


def _adapters(count: int) -> str:
    return f"{count} adapter{'' if count == 1 else 's'}"


def _pairs(ours: Sequence[Point], theirs: Sequence[Point]) -> list[tuple[Point, Point]]:
    by_count = {point.num_adapters: point for point in theirs}
    return [(point, by_count[point.num_adapters]) for point in ours if point.num_adapters in by_count]


def _largest(result: LoadTestResult, system: str) -> int:
    """0 if it survived none."""
    return max((point.num_adapters for point in curve(result, system) if point.survived), default=0)


def limits(result: LoadTestResult) -> list[str]:
    """Why each system survived no more adapters, and why what was not run was not."""
    found: list[RunResult | Refusal] = []
    for system in tried(result):
        beyond = [point for point in curve(result, system) if point.num_adapters > _largest(result, system)]
        found += [next(run for run in point.runs if not survived(run)) for point in beyond[:1]]
        found += [refusal for refusal in result.refusals if refusal.system == system]
    return [f"{one.system} with {_adapters(one.num_adapters)}: {_reason(one)}." for one in found]


def failures(run: RunResult) -> Mapping[str, int]:
    """By status. Where an overload was asked for, who is refused or out of time in it is no failure."""
    return run.summary.errors if run.overload is None else run.overload.total.errors


def _reason(outcome: RunResult | Refusal) -> str:
    if isinstance(outcome, Refusal):
        return f"not run. {outcome.why.rstrip('.')}"
    if failures(outcome) or not outcome.summary.ok:
        return _failures(outcome)
    return f"{outcome.summary.goodput_share:.0%} of the requests met the objective"


def _failures(run: RunResult) -> str:
    if not run.summary.requests:
        return "no request was counted"
    failed = failures(run)
    errors = ", ".join(f"{count} x {status}" for status, count in failed.items())
    if not errors:
        return "no request was answered"
    return f"{sum(failed.values())} of {run.summary.requests} requests failed ({errors})"


def warnings(result: LoadTestResult) -> list[str]:
    """What must be known before a figure is believed."""
    found = [*result.notes]
    for run in result.runs:
        summary, health = run.summary, run.summary.generator
        if health.limited:
            found.append(
                f"{summary.label}: the load generator was the bottleneck (sent up to {seconds(health.send_lag_p99_s)} "
                f"late, woke up {seconds(health.wake_lag_p99_s)} late, used {health.cpu_share:.0%} of a core). "
                "Do not believe its figures."
            )
        if failures(run) or not summary.requests:
            found.append(f"{summary.label}: {_failures(run)}.")
    return found


@dataclass(frozen=True, slots=True)
class Comparison:
    """A figure of one run, as it was predicted and as it was measured."""

    figure: str
    predicted: str
    measured: str
    error: str  # of the prediction, as a share of what was measured


def comparisons(run: RunResult) -> list[Comparison]:
    """None if nothing was predicted."""
    if run.predicted is None:
        return []
    ours, theirs = run.predicted.summary, run.summary
    times = [
        ("first token, mean", ours.ttft_s.mean, theirs.ttft_s.mean),
        ("first token, p50", ours.ttft_s.p50, theirs.ttft_s.p50),
        ("first token, p99", ours.ttft_s.p99, theirs.ttft_s.p99),
        ("between tokens, mean", ours.itl_s.mean, theirs.itl_s.mean),
        ("between tokens, p50", ours.itl_s.p50, theirs.itl_s.p50),
        ("between tokens, p99", ours.itl_s.p99, theirs.itl_s.p99),
    ]
    found = [_comparison_of("tokens a second", ours.tokens_per_s, theirs.tokens_per_s, "{:.1f}".format)]
    found += [_comparison_of(figure, predicted, measured, seconds) for figure, predicted, measured in times]
    met = f"{ours.goodput_share:.0%}", f"{theirs.goodput_share:.0%}"
    found.append(
        Comparison("met the objective", *met, f"{100 * (ours.goodput_share - theirs.goodput_share):+.0f} points")
    )
    if run.memory_bytes is not None:
        gigabytes = run.predicted.memory_bytes / 1e9, run.memory_bytes / 1e9
        found.append(_comparison_of("memory", *gigabytes, "{:.1f} GB".format))
    return found


def _comparison_of(figure: str, predicted: float, measured: float, shown: Callable[[float], str]) -> Comparison:
    error = f"{predicted / measured - 1:+.0%}" if measured else "none was measured"
    return Comparison(figure, shown(predicted), shown(measured), error)


def explanation(story: ServerStory) -> str:
    """Where the server's time went."""
    total_s = sum(story.phase_s.values())
    forward = story.phase_s.get("forward", 0.0) / total_s if total_s else 0.0
    passes = f"{story.steps} forward passes with {story.mean_rows:.1f} requests each"
    parts = [f"{passes} took {forward:.0%} of the steps' time"]
    parts.append(f"requests waited {seconds(story.queue_s)} in the queue")
    if story.adapter_loads:
        loading = seconds(story.adapter_load_s)
        parts.append(f"{story.adapter_loads} adapters came from disk ({loading} of loading in all)")
    if story.adapter_wait_s:
        parts.append(f"requests waited {seconds(story.adapter_wait_s)} for their adapter on average")
    if story.adapter_evictions:
        parts.append(f"{story.adapter_evictions} adapters left the pool for others")
    if story.preemptions:
        parts.append(f"KV pages were taken from a request, which was then computed again, {story.preemptions} times")
    return "; ".join(parts) + "."


def seconds(value: float) -> str:
    """1.23 s; 45 ms below a second, 4.5 ms below ten."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{1000 * value:.0f} ms" if value >= 0.01 or not value else f"{1000 * value:.1f} ms"
