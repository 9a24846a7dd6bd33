"""Tests of Triton kernels on a CPU, by Triton's interpreter, which is on or off for a whole process:

TRITON_INTERPRET=1 python -m pytest tests/interpreted
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]  # `make test` runs them in a process of their own


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN in every float dtype, and no item of any list: who reads it cannot pass by luck."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        tensor.view(torch.uint8).fill_(255) if tensor.is_contiguous() and tensor.numel() else None
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
