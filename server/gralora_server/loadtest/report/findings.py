"""What a result says, in words: the answer first, then what to mistrust. Every figure comes from the result."""

from __future__ import annotations

from collections.abc import Sequence

from gralora_server.loadtest.result import LoadTestResult, RunResult, ServerStory

SURVIVAL_SHARE = 0.9


def is_comparison(result: LoadTestResult) -> bool:
    return len({(run.system, run.num_adapters) for run in result.runs}) > 1


def systems(result: LoadTestResult) -> list[str]:
    """In the order of their first run."""
    return list(dict.fromkeys(run.system for run in result.runs))


def curve(result: LoadTestResult, system: str) -> list[RunResult]:
    """The runs of one system, by number of adapters."""
    return sorted((run for run in result.runs if run.system == system), key=lambda run: run.num_adapters)


def survived(run: RunResult) -> bool:
    """No errors, and nearly everybody was served as promised."""
    return not run.summary.errors and run.summary.ok > 0 and run.summary.goodput_share >= SURVIVAL_SHARE


def answer(result: LoadTestResult) -> list[str]:
    """A sentence or two for who reads nothing else."""
    if not result.runs:
        return ["Nothing could be run."]
    return _comparison(result) if is_comparison(result) else _single(result.runs[0])


def _single(run: RunResult) -> list[str]:
    summary = run.summary
    slo = f"first token within {summary.slo.ttft_s:g} s, then at most {1000 * summary.slo.itl_s:g} ms a token"
    rates = f"{summary.requests_per_s:.2f} requests and {summary.tokens_per_s:.0f} tokens a second"
    half, most = seconds(summary.ttft_s.p50), seconds(summary.ttft_s.p99)
    met = f"{summary.goodput_share:.0%} of the requests met the objective ({slo})"
    return [
        f"{rates} for {run.num_adapters} adapters; {met}.",
        f"Half of the first tokens came within {half}, 99 % within {most}.",
    ]


def _comparison(result: LoadTestResult) -> list[str]:
    first, *others = systems(result)
    said = []
    for other in others:
        pairs = _pairs(curve(result, first), curve(result, other))
        if pairs:
            ours, theirs = pairs[-1]
            ratio = ours.summary.tokens_per_s / theirs.summary.tokens_per_s if theirs.summary.tokens_per_s else None
            times = f"{ratio:.2g} times" if ratio is not None else "beside nothing at all from"
            said.append(
                f"With {ours.num_adapters} adapters, {first} gives {ours.summary.tokens_per_s:.0f} tokens a second: "
                f"{times} {other} ({theirs.summary.tokens_per_s:.0f})."
            )
    limits = [f"{system}: {_largest(result, system)}" for system in systems(result)]
    return [*said, f"Largest number of adapters that was survived: {'; '.join(limits)}."]


def _pairs(ours: Sequence[RunResult], theirs: Sequence[RunResult]) -> list[tuple[RunResult, RunResult]]:
    by_count = {run.num_adapters: run for run in theirs}
    return [(run, by_count[run.num_adapters]) for run in ours if run.num_adapters in by_count]


def _largest(result: LoadTestResult, system: str) -> str:
    counts = [run.num_adapters for run in curve(result, system) if survived(run)]
    return str(max(counts)) if counts else "none"


def warnings(result: LoadTestResult) -> list[str]:
    """What must be known before a figure is believed."""
    found = []
    for run in result.runs:
        summary, health = run.summary, run.summary.generator
        if health.limited:
            found.append(
                f"{summary.label}: the load generator was the bottleneck (sent up to {seconds(health.send_lag_p99_s)} "
                f"late, woke up {seconds(health.wake_lag_p99_s)} late, used {health.cpu_share:.0%} of a core). "
                "Do not believe its figures."
            )
        if summary.errors:
            errors = ", ".join(f"{count} x {status}" for status, count in summary.errors.items())
            failed = sum(summary.errors.values())
            found.append(f"{summary.label}: {failed} of {summary.requests} requests failed ({errors}).")
        if not summary.requests:
            found.append(f"{summary.label}: no request was counted.")
    return [*found, *(f"{one.system} with {one.num_adapters} adapters: not run. {one.why}." for one in result.refusals)]


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
        parts.append(f"{story.preemptions} requests lost their KV pages and were computed again")
    return "; ".join(parts) + "."


def seconds(value: float) -> str:
    """1.23 s, or 45 ms below a second."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"
