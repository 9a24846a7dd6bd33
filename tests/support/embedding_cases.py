"""Adapters on an embedding in an arena: pairs, rows in the place of the base model's, and both at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support.kernel_cases import CPU, Case, cells_of
from torch import Tensor

from gralora_kernels.alignment import map_numel
from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.reference.adapters import ReferenceBackend
from gralora_kernels.tables import DTYPES, Entry, GroupTable, Storage

VOCAB = 53
FACTOR = 1.75
# By slot: ranks of its pairs, their storage, and the tokens that have rows of their own (None: none, (): all).
SLOTS: tuple[tuple[Sequence[int], Storage, tuple[int, ...] | None], ...] = (
    ((5,), Storage.NATIVE, None),
    ((), Storage.NATIVE, ()),
    ((), Storage.NATIVE, (3, 52, 0)),
    ((37,), Storage.BFLOAT16, None),
    ((), Storage.NATIVE, None),
    ((1, 16), Storage.FLOAT16, None),
    ((64,), Storage.NATIVE, (7,)),
)


def embedding_case(hidden: int, *, keeps_16_bit: bool = True) -> Case:
    """Slots as `SLOTS` has them, or all in fp32. Gaps of the arena hold NaN."""
    group = GroupTable(VOCAB, [hidden], len(SLOTS), CPU)
    (table,) = group.modules
    generator = torch.Generator().manual_seed(hidden)
    pieces: list[Tensor] = []
    size = 0

    def put(cells: Tensor) -> int:
        nonlocal size
        pieces.append(cells)
        size += len(cells)
        return size - len(cells)

    def random(numel: int, storage: Storage) -> Tensor:
        return cells_of((torch.randn(numel, generator=generator) / 8).to(DTYPES.get(storage, torch.float32)))

    for slot, (ranks, kept, tokens) in enumerate(SLOTS):
        storage = kept if keeps_16_bit else Storage.NATIVE
        entries = [
            Entry(
                a_offset=put(random(r * VOCAB, storage)), b_offset=put(random(r * hidden, storage)), r=r, k=1,
                scale=0.5 + slot / 4, storage=storage,
            )
            for r in ranks
        ]  # fmt: skip
        affine = None
        if tokens is not None:
            own = tokens or range(VOCAB)
            row_of = torch.zeros(map_numel(VOCAB, 4), dtype=torch.int32)
            row_of[list(own)] = torch.arange(1, 1 + len(own), dtype=torch.int32)
            rows = torch.randn(len(own) * hidden, generator=generator)
            affine = put(torch.cat([row_of.view(torch.float32), cells_of(rows)]))
        table.set(slot, entries, affine)
    return Case(group, torch.cat(pieces))


def looked_up(case: Case, backend: AdapterBackend, slots: Sequence[int], ids: Tensor) -> Tensor:
    """What adapters make of the rows of a table of random ones."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(VOCAB, case.group.out_features, generator=generator)
    rows = (table[ids] * FACTOR).contiguous()
    arena = case.arranged(backend.packing.panel)
    backend.look_up(rows, ids, arena, case.group, case.grouping(slots), factor=FACTOR)
    return rows


def expected(case: Case, slots: Sequence[int], ids: Tensor) -> Tensor:
    return looked_up(case, ReferenceBackend(), slots, ids)
