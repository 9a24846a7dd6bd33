"""The one way in which anything here is timed: by the GPU's own events, or by the host's clock in a dry run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def device() -> torch.device:
    """The GPU; the CPU, whose kernels Triton's interpreter runs, in a dry run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Until the device has done everything."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ms(work: Callable[[], object], rounds: int, warm: int = 3) -> float:
    """Of the whole of `work`, host and device, each round alone."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(rounds):
        wait()
        started_s = time.perf_counter()
        work()
        wait()
        times.append(1e3 * (time.perf_counter() - started_s))
    return statistics.median(times)


def device_ms(work: Callable[[], object], rounds: int, warm: int = 3) -> float:
    """Of what the device does for `work`, by its events."""
    if not torch.cuda.is_available():
        return median_ms(work, rounds, warm)
    times = []
    for i in range(rounds + warm):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        if i >= warm:
            times.append(begin.elapsed_time(end))
    return float(statistics.median(times))


def host_ms(work: Callable[[], object], rounds: int) -> float:
    """Of what the host does until it could go on, the device being idle before."""
    times = []
    for _ in range(rounds):
        wait()
        started_s = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - started_s))
    wait()
    return statistics.median(times)
