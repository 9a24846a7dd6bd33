"""`python -m benchmarks.gpu_check`: whether the GPU's kernels and program are right on this machine, and how fast."""

from __future__ import annotations

from collections.abc import Callable

Check = tuple[str, Callable[[], str]]  # its name; returns what was found, raises AssertionError
