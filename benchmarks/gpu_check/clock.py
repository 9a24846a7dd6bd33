"""The one way in which anything here is timed: by the GPU's own events, or by the host's clock in a dry run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

BACK_TO_BACK = 10
PROFILED = 3
NAME_COLUMNS = 80  # of a kernel: C++'s are hundreds long


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
    return _events_ms(work, 1, rounds, warm) if torch.cuda.is_available() else median_ms(work, rounds, warm)


def in_a_graph_ms(work: Callable[[], object]) -> float:
    """As steps have it, without the host's time to launch it."""
    if not torch.cuda.is_available():
        return median_ms(work, 1)
    work()
    wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return device_ms(graph.replay, 50, warm=200)  # a GPU that was idle takes a while to clock up


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


def step_times(work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a step: one of many back to back, which is the device's time unless the host's is longer; one
    alone, waited for; and the host's part of that. A dry run computes where it launches, so all three are one."""
    if not torch.cuda.is_available():
        once_ms = median_ms(work, 1, warm=0)
        return {"step_ms": once_ms, "alone_ms": once_ms, "host_ms": once_ms}
    return {
        "step_ms": _events_ms(work, BACK_TO_BACK, 3, 1),
        "alone_ms": median_ms(work, 9),
        "host_ms": host_ms(work, 9),
    }


def kernel_us(work: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """By kernel of the device: how often `work` launches it, and microseconds of all of these together."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        for _ in range(PROFILED):
            work()
        wait()
    found: dict[str, tuple[int, float]] = {}
    for event in profiled.key_averages():
        if event.self_device_time_total > 0:
            name = event.key[:NAME_COLUMNS]
            count, microseconds = found.get(name, (0, 0.0))
            found[name] = count + event.count // PROFILED, microseconds + event.self_device_time_total / PROFILED
    longest = sorted(found.items(), key=lambda item: -item[1][1])
    return {name: (count, round(microseconds, 1)) for name, (count, microseconds) in longest}


def _events_ms(work: Callable[[], object], count: int, rounds: int, warm: int) -> float:
    """Of one in `count` of them, the median of the rounds."""
    times = []
    for i in range(rounds + warm):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(count):
            work()
        end.record()
        end.synchronize()
        if i >= warm:
            times.append(begin.elapsed_time(end) / count)
    return float(statistics.median(times))
