"""Random adapters in an arena, and a step over them: what the kernel tests and the interpreter's script share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from support.numeric import rms_ratio
from torch import Tensor

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.grouping import Grouping
from gralora_kernels.packing import arrange_a, arrange_b
from gralora_kernels.reference import ReferenceBackend
from gralora_kernels.tables import ALIGNMENT, Entry, ModuleTable

CPU = torch.device("cpu")
Layout = Sequence[tuple[int, int]]  # (r, k) of each entry; empty: the module has no adapter in this slot

MIXED: tuple[Layout, ...] = (
    [(16, 2)],
    [(8, 8)],
    [(3, 1)],
    [(12, 4), (5, 1)],
    [(64, 8), (8, 1)],
    [(1, 1)],
    [(2, 2)],
    [],
)


@dataclass(frozen=True, slots=True)
class Case:
    """A module with adapters in slots 0, 1, ..., and the arena that holds them."""

    table: ModuleTable
    arena: Tensor

    def step(self, token_slots: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor, Grouping]:
        """Random x [tokens, in] and y [tokens, out], grouped."""
        generator = torch.Generator().manual_seed(seed)
        grouping = self.grouping(token_slots)
        x = torch.randn(len(token_slots), self.table.in_features, generator=generator)
        y = torch.randn(len(token_slots), self.table.out_features, generator=generator)
        return x, y, grouping

    def grouping(self, token_slots: Sequence[int]) -> Grouping:
        grouping = Grouping(max(1, len(token_slots)), CPU)
        grouping.fill(token_slots, {slot: self.table.width(slot) for slot in range(self.table.max_slots)})
        return grouping

    def apply(self, backend: AdapterBackend, x: Tensor, y: Tensor, grouping: Grouping) -> Tensor:
        """What y becomes; y itself is kept."""
        result = y.clone()
        backend.apply(result, x, self.arranged(backend.panel), self.table, grouping)
        return result

    def arranged(self, panel: int) -> Tensor:
        """The arena as a backend wants its matrices to lie."""
        arena = self.arena.clone()
        for slot in range(self.table.max_slots):
            for a, b, r, k in self.table.host_index[slot].tolist():
                for offset, features, arrange in (
                    (a, self.table.in_features, arrange_a),
                    (b, self.table.out_features, arrange_b),
                ):
                    matrix = self.arena[offset : offset + r * features]
                    if r and panel:
                        arena[offset : offset + r * features] = torch.from_numpy(
                            arrange(matrix.view(r, -1).numpy(), k, panel).copy()
                        )
        return arena

    def error(self, backend: AdapterBackend, token_slots: Sequence[int]) -> float:
        """RMS error ratio of the update against the reference."""
        x, y, grouping = self.step(token_slots)
        expected = self.apply(ReferenceBackend(), x, y, grouping) - y
        return rms_ratio(expected, self.apply(backend, x, y, grouping) - y)


def make_case(in_features: int, out_features: int, layouts: Sequence[Layout], seed: int = 1) -> Case:
    """Arena gaps hold NaN: a kernel that reads outside its matrices shows it."""
    table = ModuleTable(in_features, out_features, len(layouts), CPU)
    generator = torch.Generator().manual_seed(seed)
    pieces: list[Tensor] = []
    size = 0
    for slot, layout in enumerate(layouts):
        entries = []
        for r, k in layout:
            offsets = []
            for features in (in_features, out_features):
                offsets.append(size)
                padding = ALIGNMENT + -(r * features) % ALIGNMENT
                pieces += [torch.randn(r * features, generator=generator) / 8, torch.full((padding,), float("nan"))]
                size += r * features + padding
            entries.append(Entry(a_offset=offsets[0], b_offset=offsets[1], r=r, k=k, scale=0.5 + slot / 4))
        table.set(slot, entries)
    return Case(table, torch.cat(pieces) if pieces else torch.zeros(ALIGNMENT))


def token_slots(num_tokens: int, num_slots: int, seed: int = 0) -> list[int]:
    """Tokens in any order, the base model (-1) among them."""
    slots: list[int] = np.random.default_rng(seed).integers(-1, num_slots, num_tokens).tolist()
    return slots
