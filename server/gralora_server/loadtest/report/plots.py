"""A result's plots: which there are, and what is on them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from gralora_server.loadtest.report.drawing import HATCHES, INK, LINES, MARKERS, SERIES, SIZE, Plot, delay_scale, drawn
from gralora_server.loadtest.report.findings import curve, is_comparison, seconds, systems, throughput
from gralora_server.loadtest.report.overload_plots import memory_plot, overload_plots
from gralora_server.loadtest.result import LoadTestResult, RunResult, ServerStory

if TYPE_CHECKING:  # where there is no matplotlib, `drawing` says what to install
    from matplotlib.axes import Axes


def plots(result: LoadTestResult) -> list[Plot]:
    """Those that the result has data for."""
    if not result.runs:
        return []
    if is_comparison(result):
        return _comparison(result)
    return _single(result.runs[0])


def _comparison(result: LoadTestResult) -> list[Plot]:
    if len({run.num_adapters for run in result.runs}) == 1:
        return [_bars(result)]
    found = [
        _over_adapters(result, "throughput", "Throughput", "tokens a second", throughput),
        _over_adapters(result, "ttft", "First token, 99th percentile", "", lambda run: run.summary.ttft_s.p99),
        _over_adapters(result, "ttft-p50", "First token, median", "", lambda run: run.summary.ttft_s.p50),
    ]
    known = result.model_copy(update={"runs": tuple(run for run in result.runs if run.memory_bytes is not None)})
    if known.runs:
        title = "Memory of the server"
        found.append(_over_adapters(known, "memory", title, "GB", lambda run: (run.memory_bytes or 0) / 1e9))
    phases = {
        f"{system}, {point.num_adapters}": told
        for system in systems(result)
        for point in curve(result, system)
        if (told := [run.server for run in point.runs if run.server and run.server.steps])
    }
    return [*found, _steps(phases)] if phases else found


def _over_adapters(
    result: LoadTestResult,
    name: str,
    title: str,
    unit: str,
    value: Callable[[RunResult], float],
) -> Plot:
    """Medians of the rounds, and from the smallest to the largest. `unit` is empty for seconds, which are drawn on a
    logarithmic scale: they span milliseconds to minutes."""
    places = {system: i for i, system in enumerate(systems(result))}
    counts = sorted({run.num_adapters for run in result.runs})

    def draw(axes: Axes) -> None:
        for system, i in places.items():
            points = curve(result, system)
            at = [point.num_adapters for point in points]
            low, high = zip(*(point.range(value) for point in points), strict=True)
            axes.fill_between(at, low, high, color=SERIES[i % len(SERIES)], alpha=0.2, linewidth=0)
            axes.plot(
                at,
                [point.median(value) for point in points],
                color=SERIES[i % len(SERIES)],
                marker=MARKERS[i % len(MARKERS)],
                linestyle=LINES[i % len(LINES)],
                label=system,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("adapters (customers)")
        if unit:
            axes.set_ylabel(unit)
            axes.set_ylim(bottom=0)
        else:
            delay_scale(axes)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)

    shown: Callable[[float], str] = (lambda amount: f"{amount:.3g}") if unit else seconds
    said = [
        f"{system}: "
        + ", ".join(f"{shown(point.median(value))} at {point.num_adapters}" for point in curve(result, system))
        for system in places
    ]
    what = f"{title} in {unit}" if unit else title
    height = SIZE[1] + 0.25 * len(places)
    return drawn(name, title, f"{what} over the number of adapters. {'; '.join(said)}.", draw, height)


def _steps(stories: Mapping[str, Sequence[ServerStory]]) -> Plot:
    """Phases of a mean step, one bar for all rounds of a system and a number of adapters."""
    phases = list(dict.fromkeys(phase for rounds in stories.values() for story in rounds for phase in story.phase_s))
    means = {
        label: [
            1000 * sum(story.phase_s.get(phase, 0.0) for story in rounds) / sum(story.steps for story in rounds)
            for phase in phases
        ]
        for label, rounds in stories.items()
    }

    def draw(axes: Axes) -> None:
        for i, phase in enumerate(phases):
            left = [sum(mean[:i]) for mean in means.values()]
            widths = [mean[i] for mean in means.values()]
            bars = axes.barh(range(len(means)), widths, left=left, height=0.6, label=phase, linewidth=0.5)
            for bar in bars:
                bar.set(facecolor=SERIES[i % len(SERIES)], hatch=HATCHES[i % len(HATCHES)], edgecolor=INK)
        axes.set_yticks(range(len(means)), [textwrap.fill(label, 18) for label in means])
        axes.invert_yaxis()
        axes.set_xlabel("ms a step")
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.1 - 0.5 / len(means)), ncols=3, frameon=False)

    said = [
        f"{label}: {sum(mean):.1f} ms, of it "
        + ", ".join(f"{phase} {value:.1f}" for phase, value in zip(phases, mean, strict=True))
        for label, mean in means.items()
    ]
    return drawn(
        "steps", "Where the server's time went", f"A mean step. {'; '.join(said)}.", draw, 2 + 0.5 * len(means)
    )


def _bars(result: LoadTestResult) -> Plot:
    runs = result.runs

    def draw(axes: Axes) -> None:
        places = range(len(runs))
        axes.barh(places, [run.summary.tokens_per_s for run in runs], color=SERIES[0], height=0.6)
        axes.set_yticks(places, [textwrap.fill(run.summary.label, 24) for run in runs])
        axes.invert_yaxis()
        axes.set_xlabel("tokens a second")

    said = ", ".join(f"{run.summary.label} {run.summary.tokens_per_s:.0f}" for run in runs)
    return drawn("throughput", "Throughput", f"Tokens a second: {said}.", draw, 1.5 + 0.6 * len(runs))


def _single(run: RunResult) -> list[Plot]:
    found = [_delays(run)]
    if run.timeline:
        found.insert(0, _timeline(run))
    if run.overload is not None:
        found += overload_plots(run.overload)
    if any(sample.memory_bytes for sample in run.timeline):
        found.append(memory_plot(run.timeline))
    if run.server is not None and run.server.phase_s:
        found.append(_phases(run.server.phase_s))
    return found


def _timeline(run: RunResult) -> Plot:
    times = [sample.at_s for sample in run.timeline]
    tokens, running = [one.tokens for one in run.timeline], [one.in_flight for one in run.timeline]

    def draw(axes: Axes) -> None:
        axes.plot(times, tokens, color=SERIES[0], label="tokens in the last second")
        axes.set_ylabel("tokens a second")
        axes.set_xlabel("seconds from the start")
        axes.set_ylim(bottom=0)
        other = axes.twinx()
        other.plot(times, running, color=SERIES[1], linestyle="--", label="requests in flight")
        other.set_ylabel("requests in flight")
        other.set_ylim(bottom=0)
        lines = [*axes.get_lines(), *other.get_lines()]
        axes.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)

    text = f"Tokens a second between {min(tokens)} and {max(tokens)}, up to {max(running)} requests in flight."
    return drawn("timeline", "The run, second by second", text, draw)


def _delays(run: RunResult) -> Plot:
    summary = run.summary
    kinds = {"first token": summary.ttft_s, "between tokens": summary.itl_s, "whole answer": summary.e2e_s}
    points = ("p50", "p90", "p99")

    def draw(axes: Axes) -> None:
        for i, point in enumerate(points):
            values = [max(getattr(of, point), 1e-4) for of in kinds.values()]
            places = [kind + 0.25 * (i - 1) for kind in range(len(kinds))]
            bars = axes.barh(places, values, height=0.22, color=SERIES[i], label=point)
            axes.bar_label(bars, [f"{point} {seconds(value)}" for value in values], fontsize=11, padding=3)
        axes.set_yticks(range(len(kinds)), [name.replace(" ", "\n") for name in kinds])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(low, high * (high / low) ** 0.4)  # room for the labels, which say what the axis would
        axes.xaxis.set_visible(False)

    said = [f"{name} {seconds(of.p50)}, {seconds(of.p90)} and {seconds(of.p99)}" for name, of in kinds.items()]
    return drawn("delays", "Delays", f"50th, 90th and 99th percentile: {'; '.join(said)}.", draw, height=3.8)


def _phases(phase_s: Mapping[str, float]) -> Plot:
    total = sum(phase_s.values()) or 1.0
    names = sorted(phase_s, key=lambda name: -phase_s[name])

    def draw(axes: Axes) -> None:
        bars = axes.barh(
            range(len(names)), [100 * phase_s[name] / total for name in names], color=SERIES[0], height=0.6
        )
        axes.bar_label(bars, [f"{100 * phase_s[name] / total:.1f} %" for name in names], padding=3)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 115)
        axes.set_xlabel("% of the time in steps")

    said = ", ".join(f"{name} {phase_s[name] / total:.1%}" for name in names)
    return drawn("phases", "Where the server's time went", f"Shares of the steps' time: {said}.", draw, height=2.6)
