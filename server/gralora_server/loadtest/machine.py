"""What a reader must know of a machine to believe a figure. Names no host and no path, so that it can be published."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import psutil


def facts() -> dict[str, str]:
    memory_gib = psutil.virtual_memory().total / (1 << 30)
    return {
        "CPU": cpu_name(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_gib:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        **{name: version(name) for name in ("gralora-server", "torch", "numba", "grpcio")},
    }


def cpu_name() -> str:
    """As the maker writes it; the architecture where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 -- read line by line, to the first match
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
