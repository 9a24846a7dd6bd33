"""Settings of every test: one event loop for all asynchronous ones, and one computing thread.

Tiny models gain nothing from threads, and spinning ones would slow whatever runs beside.
"""

from __future__ import annotations

import support.pipelined  # noqa: F401  # engines of all tests, if it is asked for
import torch
from support.one_loop import pytest_pyfunc_call, pytest_unconfigure

__all__ = ["pytest_pyfunc_call", "pytest_unconfigure"]

torch.set_num_threads(1)
