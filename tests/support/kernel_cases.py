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
from gralora_kernels.tables import ALIGNMENT, Entry, GroupTable, ModuleTable

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
    """A projection group with adapters in slots 0, 1, ..., and the arena that holds them."""

    group: GroupTable
    arena: Tensor

    @property
    def table(self) -> ModuleTable:
        """The group's first module: the only one, unless the case was made with several widths."""
        return self.group.modules[0]

    def step(self, token_slots: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor, Grouping]:
        """Random x [tokens, in] and y [tokens, out], grouped."""
        generator = torch.Generator().manual_seed(seed)
        grouping = self.grouping(token_slots)
        x = torch.randn(len(token_slots), self.group.in_features, generator=generator)
        y = torch.randn(len(token_slots), self.group.out_features, generator=generator)
        return x, y, grouping

    def grouping(self, token_slots: Sequence[int]) -> Grouping:
        grouping = Grouping(max(1, len(token_slots)))
        slots = range(self.group.max_slots)
        grouping.fill(token_slots, {slot: max(table.width(slot) for table in self.group.modules) for slot in slots})
        return grouping

    def apply(self, backend: AdapterBackend, x: Tensor, y: Tensor, grouping: Grouping) -> Tensor:
        """What y becomes; y itself is kept."""
        result = y.clone()
        backend.prepare([self.group], grouping)
        backend.apply(result, x, self.arranged(backend.panel), self.group, grouping)
        return result

    def arranged(self, panel: int) -> Tensor:
        """The arena as a backend wants its matrices to lie."""
        arena = self.arena.clone()
        for table in self.group.modules:
            for a, b, r, k in table.host_index.reshape(-1, 4).tolist():
                for offset, features, arrange in (
                    (a, table.in_features, arrange_a),
                    (b, table.out_features, arrange_b),
                ):
                    if r and panel:
                        matrix = self.arena[offset : offset + r * features].view(r, -1).numpy()
                        arena[offset : offset + r * features] = torch.from_numpy(arrange(matrix, k, panel).copy())
        return arena

    def error(self, backend: AdapterBackend, token_slots: Sequence[int]) -> float:
        """RMS error ratio of the update against the reference."""
        x, y, grouping = self.step(token_slots)
        expected = self.apply(ReferenceBackend(), x, y, grouping) - y
        return rms_ratio(expected, self.apply(backend, x, y, grouping) - y)


def make_case(in_features: int, out_features: int | Sequence[int], layouts: Sequence[Layout], seed: int = 1) -> Case:
    """Several widths make several modules; module m has the layouts from the m-th on, so that modules differ.

    Arena gaps hold NaN: a kernel that reads outside its matrices shows it.
    """
    outs = [out_features] if isinstance(out_features, int) else out_features
    group = GroupTable(in_features, outs, len(layouts), CPU)
    generator = torch.Generator().manual_seed(seed)
    pieces: list[Tensor] = []
    size = 0
    for m, table in enumerate(group.modules):
        for slot in range(len(layouts)):
            entries = []
            for r, k in layouts[(slot + m) % len(layouts)]:
                offsets = []
                for features in (in_features, table.out_features):
                    offsets.append(size)
                    padding = ALIGNMENT + -(r * features) % ALIGNMENT
                    pieces += [torch.randn(r * features, generator=generator) / 8, torch.full((padding,), float("nan"))]
                    size += r * features + padding
                entries.append(Entry(a_offset=offsets[0], b_offset=offsets[1], r=r, k=k, scale=0.5 + slot / 4))
            table.set(slot, entries)
    return Case(group, torch.cat(pieces) if pieces else torch.zeros(ALIGNMENT))


def token_slots(num_tokens: int, num_slots: int, seed: int = 0) -> list[int]:
    """Tokens in any order, the base model (-1) among them."""
    slots: list[int] = np.random.default_rng(seed).integers(-1, num_slots, num_tokens).tolist()
    return slots
