"""Tests of Triton kernels on a CPU, by Triton's interpreter, which is on or off for a whole process:

TRITON_INTERPRET=1 python -m pytest tests/interpreted
"""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]  # `make test` runs them in a process of their own
else:
    from support.quick_interpreter import make_quick

    make_quick()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN in every float dtype, and no item of any list: who reads it cannot pass by luck."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        tensor.view(-1).view(torch.uint8).fill_(255) if tensor.is_contiguous() and tensor.numel() else None
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def row_by_row_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products whose rows depend neither on their place nor on their number, as a tensor core's: those of numpy's BLAS
    do."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: type | None = None) -> np.ndarray:
        # Sums along contiguous memory have one order.
        return np.ascontiguousarray(a[:, None, :] * b.T[None]).sum(-1, dtype=dtype)

    monkeypatch.setattr(np, "matmul", matmul)
