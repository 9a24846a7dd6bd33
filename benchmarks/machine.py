"""What the numbers depend on: the machine, the versions, and the two rates that floors are computed from.

Knows no model. Both rates are the best of several passes, because a floor must not be lower than what is possible.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import psutil
import torch

from gralora_server.loadtest.machine import cpu_name

PACKAGES = ("torch", "triton", "transformers", "peft", "numba", "numpy", "grpcio")
# What changes how threads wait or how many there are.
THREAD_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "NUMBA_")
PASSES = 7
GEMM_SHAPES = {"square 2048": (2048, 2048, 2048), "tall 4096x576x1536": (4096, 576, 1536)}
CHUNK = 1 << 16  # elements that one thread sums at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """By method, in bytes and FLOP per second; the larger of each is the rate that floors use."""

    read_bytes_per_s: dict[str, float]
    gemm_flop_per_s: dict[str, float]


def measure_rates(num_bytes: int, gemm_shapes: dict[str, tuple[int, int, int]] | None = None) -> Rates:
    """With as many threads as torch and Numba use now, which must be as many as the engine is served with."""
    block = torch.ones(num_bytes // 4, dtype=torch.float32)
    values = block.numpy()
    reads: dict[str, Callable[[], object]] = {"torch sum": block.sum, "Numba sum": lambda: chunked_sum(values)}
    shapes = gemm_shapes if gemm_shapes is not None else GEMM_SHAPES
    return Rates(
        read_bytes_per_s={name: 4 * len(block) / _best_s(read) for name, read in reads.items()},
        gemm_flop_per_s={name: _gemm_rate(*shape) for name, shape in shapes.items()},
    )


def best_of(*rates: Rates) -> Rates:
    """Method by method the best: a pass that a neighbour disturbed says nothing about the machine."""
    reads, gemms = [rate.read_bytes_per_s for rate in rates], [rate.gemm_flop_per_s for rate in rates]
    return Rates(
        read_bytes_per_s={name: max(read[name] for read in reads) for name in reads[0]},
        gemm_flop_per_s={name: max(gemm[name] for gemm in gemms) for name in gemms[0]},
    )


def facts() -> dict[str, Any]:
    """Names no path and no host, so that it can be published."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "thread_environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(THREAD_VARIABLES)},
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def busy_share(seconds: float = 1.0) -> float:
    """How much of all cores others use while this process waits; more than a few percent spoils a run."""
    return statistics.fmean(psutil.cpu_percent(interval=seconds, percpu=True)) / 100


def resident_bytes() -> int:
    """Memory of this process that is really there."""
    return int(psutil.Process().memory_info().rss)


@numba.njit(parallel=True, fastmath=True, nogil=True)
def chunked_sum(values: npt.NDArray[np.float32]) -> np.float32:
    """Of whole chunks; what is left over at the end is not read."""
    total = np.float32(0)
    for chunk in numba.prange(len(values) // CHUNK):
        block = values[chunk * CHUNK : (chunk + 1) * CHUNK]  # a slice with its own index is what becomes SIMD code
        partial = np.float32(0)
        for i in range(len(block)):
            partial += block[i]
        total += partial
    return total


def _gemm_rate(m: int, k: int, n: int) -> float:
    a, b = torch.randn(m, k), torch.randn(k, n)
    out = torch.empty(m, n)
    return 2 * m * k * n / _best_s(lambda: torch.mm(a, b, out=out))


def _best_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(PASSES + 1):  # the first compiles and faults pages in
        started_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_s)
    return min(times[1:])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return answer.stdout.strip()
