"""Asynchronous tests, on the process's one event loop."""

from support.one_loop import pytest_pyfunc_call, pytest_unconfigure

__all__ = ["pytest_pyfunc_call", "pytest_unconfigure"]
