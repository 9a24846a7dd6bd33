"""Compiles at start what the first requests would otherwise wait for. Knows no model: small made-up shapes do."""

from __future__ import annotations

import numpy as np
import torch

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.grouping import Grouping
from gralora_kernels.packing import Packing
from gralora_kernels.stages import StartStage
from gralora_kernels.tables import Entry, ModuleTable

# Features and k: one width that the GPU kernels may assume aligned and one not (200 / 8 = 25); 32 tokens of either are
# enough work for the CPU to go parallel, one token is not. The GPU has other tiles for one token, a few, and a prompt.
SHAPES = ((256, 1), (200, 8))
TOKENS = (1, 32, 600)
RANK = 16


def load_kernels(backend: AdapterBackend, stage: StartStage) -> None:
    """Those that no model is computed without."""
    if backend.name == "cpu":
        from gralora_kernels.cpu.families import load_families

        load_families(stage)


def warm_up_backend(backend: AdapterBackend, *, device: torch.device, dtype: torch.dtype) -> None:
    """Run every variant of the kernels once, and see that it does what it should to the right rows."""
    _warm_up_loading(backend.packing)
    for features, k in SHAPES:
        table = ModuleTable(features, features, 1, device)
        entry = Entry(a_offset=0, b_offset=RANK * features, r=RANK, k=k, scale=1.0)
        table.set(0, [entry])
        arena = torch.ones(2 * RANK * features, device=device, dtype=dtype)
        for num_tokens in TOKENS:
            grouping = Grouping(num_tokens + 1)
            grouping.fill([0] * num_tokens + [-1], {0: entry.width})
            x = torch.ones(num_tokens + 1, features, device=device, dtype=dtype)
            y = torch.zeros_like(x)
            backend.prepare([table.group], grouping)
            backend.apply(y, x, arena, table.group, grouping)
            assert y[:-1].all(), "the adapter did nothing"
            assert not y[-1].any(), "a base-model row was changed"


def _warm_up_loading(packing: Packing) -> None:
    packing.hash_many(np.zeros(1, np.uint8), np.array([[0, 1]]))
    if packing.place_many is not None:
        for bits in (np.uint16, np.uint32):
            out = np.zeros(1, bits)
            packing.place_many(out, np.ones(1, bits), np.array([[0, 0, 1, 1, 1, 0]]))
            assert out.all(), "nothing was placed"
