"""What all adapter tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from adapters.harness import Gate


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The tensors are tiny: more threads only wait for each other, and on a busy machine they wait long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)
