"""The plot of a soak: memory and descriptors, and how long people waited, by the minute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot(figures: Mapping[str, Any], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    minutes = [at_s / 60 for at_s, *_ in figures["health"]]
    above.plot(minutes, [row[1] for row in figures["health"]], color="#0072b2", label="MiB resident")
    above.set(ylabel="MiB resident", ylim=(0, None))
    beside = above.twinx()
    beside.plot(minutes, [row[2] for row in figures["health"]], color="#d55e00", label="descriptors")
    beside.set(ylabel="open descriptors", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=2)
    waits = [row for row in figures["by_minute"] if row["minute"] < figures["minutes"]]
    for key, label, color in (
        ("ttft_p99_s", "first token, P99", "#0072b2"),
        ("ttft_p50_s", "first token, median", "#56b4e9"),
        ("itl_p99_s", "between tokens, P99", "#d55e00"),
    ):
        below.plot([row["minute"] + 0.5 for row in waits], [row[key] for row in waits], color=color, label=label)
    below.set(xlabel="minutes", ylabel="seconds", ylim=(0, None))
    below.legend()
    for axes in (above, below):
        axes.grid(color="#d0d7de")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
