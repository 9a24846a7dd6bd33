"""Plots of one run over its time: what was in time, who was refused, who was served how much, and the memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gralora_server.loadtest.overload import Overload
from gralora_server.loadtest.report.drawing import GRID, INK, LINES, SERIES, SIZE, Plot, drawn
from gralora_server.loadtest.report.findings import seconds
from gralora_server.loadtest.result import Sample

if TYPE_CHECKING:  # where there is no matplotlib, `drawing` says what to install
    from matplotlib.axes import Axes


def overload_plots(overload: Overload) -> list[Plot]:
    """The second one only of tenants."""
    if not overload.bins:
        return []
    return [_service(overload), *([_served(overload)] if overload.tenants else [])]


def memory_plot(timeline: Sequence[Sample]) -> Plot:
    """Of a server of our own; `timeline` has its memory at least once."""
    known = [(one.at_s, one.memory_bytes / 1e9) for one in timeline if one.memory_bytes is not None]
    times, gigabytes = zip(*known, strict=True)

    def draw(axes: Axes) -> None:
        axes.plot(times, gigabytes, color=SERIES[0])
        axes.set_ylabel("GB")
        axes.set_xlabel("seconds from the start")
        axes.set_ylim(0, 1.1 * max(gigabytes))

    text = (
        f"Resident memory in GB: {gigabytes[0]:.2f} at first, {gigabytes[-1]:.2f} in the end, "
        f"{max(gigabytes):.2f} at most."
    )
    return drawn("memory", "Memory of the server", text, draw)


def _service(overload: Overload) -> Plot:
    times = [one.at_s for one in overload.bins]
    good = [one.good / overload.bin_s for one in overload.bins]
    refused = [one.refusals / overload.bin_s for one in overload.bins]
    known = [(one.at_s, one.ttft_p99_s) for one in overload.bins if one.ttft_p99_s is not None]

    def draw(axes: Axes) -> None:
        _shade(axes, overload)
        axes.step(times, good, where="post", color=SERIES[0], label="in time")
        axes.step(times, refused, where="post", color=SERIES[1], linestyle=LINES[1], label="refused")
        axes.set_ylabel("requests a second")
        axes.set_xlabel("seconds from the start")
        axes.set_ylim(bottom=0)
        other = axes.twinx()
        if known:
            other.plot(*zip(*known, strict=True), color=SERIES[2], linestyle=LINES[3], label="first token, p99")
        other.set_ylabel("seconds")
        other.set_ylim(bottom=0)
        other.grid(visible=False)
        lines = [*axes.get_lines(), *other.get_lines()]
        axes.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)

    most = f"{max(good):.3g} requests a second in time and {max(refused):.3g} refused at most"
    slowest = f"; 99 % of the first tokens within {seconds(max(delay for _, delay in known))} at worst" if known else ""
    text = f"Stretches of {overload.bin_s:g} s: {most}{slowest}."
    return drawn("overload", "In time, refused, and how long the first token took", text, draw, SIZE[1] + 0.5)


def _served(overload: Overload) -> Plot:
    """By their weights, so that equal shares are equal lines."""
    ends = [one.at_s + overload.bin_s for one in overload.bins]
    curves = {
        name: list(itertools.accumulate(one.served[name] / tenant.weight for one in overload.bins))
        for name, tenant in overload.tenants.items()
    }
    apart = [max(values) - min(values) for values in zip(*curves.values(), strict=True)]

    def draw(axes: Axes) -> None:
        _shade(axes, overload)
        for i, (name, values) in enumerate(itertools.islice(curves.items(), len(SERIES))):
            axes.plot(ends, values, color=SERIES[i], linestyle=LINES[i], label=name)
        if len(curves) > 1:
            axes.plot(ends, apart, color=INK, linewidth=1, label="most minus least")
        axes.set_ylabel("tokens by weight")
        axes.set_xlabel("seconds from the start")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)

    said = ", ".join(f"{name} {values[-1]:.0f}" for name, values in itertools.islice(curves.items(), len(SERIES)))
    text = (
        f"Tokens of prompts and answers at the scheduler's prices, divided by weights, from the start: {said} in the "
        f"end; {apart[-1]:.0f} between most and least, {max(apart):.0f} at most."
    )
    return drawn("served", "What tenants were served", text, draw, SIZE[1] + 0.25 * (1 + min(len(curves), 5) // 2))


def _shade(axes: Axes, overload: Overload) -> None:
    if overload.recovery is not None:
        axes.axvspan(overload.recovery.from_s, overload.recovery.to_s, color=GRID, alpha=0.5, linewidth=0)
