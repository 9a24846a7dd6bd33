"""A server's process over time: memory, descriptors and threads, and whether they stay what they are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil

from gralora_server.loadtest.local_server import LocalServer

WARM = 0.25  # of the run, in which caches fill


@dataclass(frozen=True, slots=True)
class Health:
    """At one moment. `at_s`: from the beginning of the run."""

    at_s: float
    memory_bytes: int
    descriptors: int
    threads: int


def look(server: LocalServer, begun_s: float) -> Health:
    """Raises psutil.Error if it died."""
    with server.process.oneshot():
        memory, threads = server.process.memory_info().rss, server.process.num_threads()
        return Health(time.monotonic() - begun_s, int(memory), int(server.process.num_fds()), int(threads))


async def watch(server: LocalServer, every_s: float, begun_s: float, samples: list[Health]) -> None:
    """Until it is cancelled, or the server died, which its clients notice."""
    while True:
        try:
            samples.append(look(server, begun_s))
        except psutil.Error:
            return
        await asyncio.sleep(every_s)


def slope(samples: Sequence[Health]) -> float:
    """Of memory, after the first quarter, as a share of its mean per hour: least squares through all samples."""
    last_s = samples[-1].at_s
    kept = [one for one in samples if one.at_s >= WARM * last_s]
    if len(kept) < 2:
        return 0.0
    hours = np.array([one.at_s / 3600 for one in kept])
    sizes = np.array([float(one.memory_bytes) for one in kept])
    return float(np.polyfit(hours, sizes, 1)[0] / sizes.mean())


def growth(samples: Sequence[Health]) -> float:
    """Over the run after its first quarter, by that line, as a share. A short run's slope says nothing by the hour."""
    return slope(samples) * (1 - WARM) * samples[-1].at_s / 3600
