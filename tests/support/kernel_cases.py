"""Random adapters in an arena, and a step over them: what the kernel tests and the interpreter's script share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from support.numeric import rms_ratio
from torch import Tensor

from gralora_kernels.alignment import ALIGNMENT
from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.grouping import Grouping
from gralora_kernels.packing import place_a, place_b
from gralora_kernels.reference.adapters import ReferenceBackend, unpack_a, unpack_b
from gralora_kernels.tables import ARENA_SLACK, DTYPES, Entry, GroupTable, ModuleTable, Storage

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
        backend.apply(result, x, self.arranged(backend.packing.panel), self.group, grouping)
        return result

    def arranged(self, panel: int) -> Tensor:
        """The arena as a backend wants its matrices to lie."""
        arena = self.arena.clone()
        for table in self.group.modules:
            rows = zip(table.host_index.reshape(-1, 4).tolist(), table.host_storage.reshape(-1).tolist(), strict=True)
            for (a, b, r, k), storage in rows:
                for offset, features, unpack, place in (
                    (a, table.in_features, unpack_a, place_a),
                    (b, table.out_features, unpack_b, place_b),
                ):
                    if r and panel:
                        blocks = unpack(_matrix(self.arena, offset, r * features, storage).view(r, -1), k)
                        place(_matrix(arena, offset, r * features, storage).numpy(), blocks.numpy(), panel)
        return arena

    def error(self, backend: AdapterBackend, token_slots: Sequence[int]) -> float:
        """RMS error ratio of the update against the reference."""
        x, y, grouping = self.step(token_slots)
        expected = self.apply(ReferenceBackend(), x, y, grouping) - y
        return rms_ratio(expected, self.apply(backend, x, y, grouping) - y)


def make_case(
    in_features: int,
    out_features: int | Sequence[int],
    layouts: Sequence[Layout],
    *,
    storages: Sequence[Storage] = (Storage.NATIVE,),
    widened: bool = False,
    seed: int = 1,
) -> Case:
    """Several widths make several modules; module m has the layouts from the m-th on, so that modules differ.

    Slots have the storages in turn; `widened`: the same weights, held in fp32. Slots 2, 5, ... have gains and shifts,
    also where they have no matrices. Arena gaps hold NaN: a kernel that uses what lies outside its matrices shows it.
    """
    outs = [out_features] if isinstance(out_features, int) else out_features
    group = GroupTable(in_features, outs, len(layouts), CPU)
    generator = torch.Generator().manual_seed(seed)
    pieces: list[Tensor] = []
    size = 0
    for m, table in enumerate(group.modules):
        for slot in range(len(layouts)):
            entries = []
            storage = storages[slot % len(storages)]
            for r, k in layouts[(slot + m) % len(layouts)]:
                offsets = []
                for features in (in_features, table.out_features):
                    offsets.append(size)
                    matrix = torch.randn(r * features, generator=generator) / 8
                    pieces.append(cells_of(matrix.to(DTYPES.get(storage, torch.float32)), widened=widened))
                    size += len(pieces[-1])
                kept = Storage.NATIVE if widened else storage
                a, b = offsets
                entries.append(Entry(a_offset=a, b_offset=b, r=r, k=k, scale=0.5 + slot / 4, storage=kept))
            affine = None
            if slot % 3 == 2:
                affine = size
                vectors = torch.randn(2 * table.out_features, generator=generator)
                pieces.append(cells_of(vectors, widened=True))
                size += len(pieces[-1])
            table.set(slot, entries, affine)
    # What may be read behind the last matrix is there, and no more.
    arena = torch.cat(pieces) if pieces else torch.zeros(ALIGNMENT)
    return Case(group, arena[: len(arena) - ALIGNMENT + ARENA_SLACK])


def cells_of(matrix: Tensor, *, widened: bool = False) -> Tensor:
    """As elements of an fp32 arena, and a gap behind."""
    if widened or matrix.dtype == torch.float32:
        cells = matrix.float()
    else:
        pair = torch.full((len(matrix) % 2,), float("nan"), dtype=matrix.dtype)
        cells = torch.cat([matrix, pair]).view(torch.float32)
    return torch.cat([cells, torch.full((ALIGNMENT + -len(cells) % ALIGNMENT,), float("nan"))])


def _matrix(arena: Tensor, offset: int, numel: int, storage: int) -> Tensor:
    """A view of one matrix's elements; those of 16 bits as integers, for numpy knows no bfloat16."""
    if storage == Storage.NATIVE:
        return arena[offset : offset + numel]
    return arena[offset:].view(torch.int16)[:numel]


def token_slots(num_tokens: int, num_slots: int, seed: int = 0) -> list[int]:
    """Tokens in any order, the base model (-1) among them."""
    slots: list[int] = np.random.default_rng(seed).integers(-1, num_slots, num_tokens).tolist()
    return slots
