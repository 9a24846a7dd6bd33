"""Settings of every test: one event loop for all asynchronous ones, and one computing thread.

Tiny models gain nothing from threads, and spinning ones would slow whatever runs beside.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import support.pipelined  # noqa: F401  # engines of all tests, if it is asked for
import torch
from support.one_loop import pytest_pyfunc_call, pytest_unconfigure

__all__ = ["pytest_pyfunc_call", "pytest_unconfigure"]

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_log_handler_outlives_its_test() -> Iterator[None]:
    """A command that was run in this process logs to what the test captured, which is closed when it ends."""
    before = set(logging.root.handlers)
    yield
    for handler in set(logging.root.handlers) - before:
        logging.root.removeHandler(handler)
