"""Compiles and runs a backend's kernels once, so that the first request does not wait for a compiler."""

from __future__ import annotations

import torch

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import Entry, ModuleTable

FEATURES = 64
NUM_TOKENS = 3


def warm_up_backend(backend: AdapterBackend, *, device: torch.device, dtype: torch.dtype) -> None:
    """One call with a hybrid adapter beside a plain one and a base row, on an arena of its own."""
    arena = torch.ones(8 * FEATURES, dtype=dtype, device=device)
    table = ModuleTable(FEATURES, FEATURES, 2, device)
    gralora = Entry(a_offset=0, b_offset=2 * FEATURES, r=2, k=2, scale=1.0)
    plain = Entry(a_offset=4 * FEATURES, b_offset=5 * FEATURES, r=1, k=1, scale=1.0)
    table.set(0, [gralora, plain])
    table.set(1, [plain])
    grouping = Grouping(NUM_TOKENS, device)
    grouping.fill([0, -1, 1], {0: gralora.width + plain.width, 1: plain.width, -1: 0})
    x = torch.ones(NUM_TOKENS, FEATURES, dtype=dtype, device=device)
    y = torch.zeros_like(x)
    backend.apply(y, x, arena, table, grouping)
    assert not y[1].any(), "a base-model row was changed"
