"""Adapters' own weights of norms, in the place of the base model's. Knows no program.

Where a program has no place for them, it computes all rows as if there were none, and theirs once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gralora_kernels.tables import GroupTable
from gralora_runtime.stepping.batch import StepTensors


@dataclass(frozen=True, slots=True)
class OwnNorm:
    """One adapter's, and its rows of a step."""

    rows: Tensor  # int64 [n], on the device
    last: Tensor  # the same of those that want logits: which of them
    weight: Tensor  # fp32 [features]
    bias: Tensor  # the same; zeros where the norm has none


@dataclass(frozen=True, slots=True)
class NormStep:
    """What one step needs of them."""

    norms: NormAdapters
    rows: Mapping[int, tuple[Tensor, Tensor]]  # see `OwnNorm`, by slot

    def of(self, name: str) -> dict[int, OwnNorm]:
        """By slot, of those that have their own weight of the norm with this name."""
        return self.norms.of(name, self.rows)


class NormAdapters:
    """Of one model."""

    def __init__(self, tables: Mapping[str, GroupTable], *, arena: Tensor) -> None:
        """`tables`: by name."""
        self._tables = tables
        self._arena = arena

    def step(self, tensors: StepTensors) -> NormStep | None:
        """None if no token has an adapter with a norm of its own."""
        used = tensors.grouping.slots
        if not any(table.rows.all_affine[:, used].any() for table in list(self._tables.values())[:1]):
            return None  # nor with gains or shifts
        tables = [table.rows.host_affine[0] for table in self._tables.values()]
        rows = {slot: self._rows(tensors, slot) for slot in used.tolist() if any(table[slot] for table in tables)}
        return NormStep(self, rows) if rows else None

    def of(self, name: str, rows: Mapping[int, tuple[Tensor, Tensor]]) -> dict[int, OwnNorm]:
        """See `NormStep`."""
        table = self._tables[name]
        at = {slot: int(table.rows.host_affine[0, slot]) for slot in rows}
        return {slot: OwnNorm(*rows[slot], *self._vectors(table, begin - 1)) for slot, begin in at.items() if begin}

    def _rows(self, tensors: StepTensors, slot: int) -> tuple[Tensor, Tensor]:
        slots = tensors.token_slots
        found = (slots == slot, slots[tensors.logits_index.numpy()] == slot)
        rows, last = (torch.from_numpy(np.flatnonzero(one)).to(self._arena.device) for one in found)
        return rows, last

    def _vectors(self, table: GroupTable, begin: int) -> tuple[Tensor, Tensor]:
        numel = 2 * table.out_features * torch.float32.itemsize // self._arena.itemsize
        weight, bias = self._arena[begin : begin + numel].view(torch.float32).view(2, -1)
        return weight, bias
