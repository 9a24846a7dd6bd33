"""A server's resident memory over time: samples, whether they are flat, and their plot."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from gralora_server.loadtest.local_server import LocalServer

Sample = tuple[float, int]  # seconds since the beginning, bytes


async def watch(server: LocalServer, every_s: float, samples: list[Sample]) -> None:
    """Until it is cancelled, or the server died."""
    begun_s = time.monotonic()
    while (now_bytes := server.memory_bytes) is not None:
        samples.append((time.monotonic() - begun_s, now_bytes))
        await asyncio.sleep(every_s)


def growth(samples: Sequence[Sample]) -> float:
    """How far the last third's median is from the middle third's, as a share of that."""
    third = max(1, len(samples) // 3)
    middle, last = (
        statistics.median(size for _, size in part)
        for part in (samples[-2 * third : -third] or samples, samples[-third:])
    )
    return abs(last / middle - 1)


def plot(samples: Sequence[Sample], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([at_s / 60 for at_s, _ in samples], [size / 2**20 for _, size in samples], color="#0072b2")
    axes.set(xlabel="minutes", ylabel="MiB resident", title="Memory of the server", ylim=(0, None))
    axes.grid(color="#d0d7de")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
