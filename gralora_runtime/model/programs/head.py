"""What adapters make of the output head's product, for the rows of a step that want logits. Knows no program.

Adapters on the head are rare, and a step has few rows there: so they are applied by a call of their own, and a step in
which nobody has one makes none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import GroupTable
from gralora_runtime.stepping.batch import StepTensors


@dataclass(frozen=True, slots=True)
class HeadStep:
    """What one step needs of it."""

    head: HeadAdapters
    grouping: Grouping

    def apply(self, logits: Tensor, hidden: Tensor) -> None:
        """logits [rows, vocab], which the base head made of hidden [rows, hidden], become the adapters'."""
        self.head.apply(logits, hidden, self.grouping)


class HeadAdapters:
    """Of one model. Its backend is its own: lists of one grouping are not those of another."""

    def __init__(self, table: GroupTable, *, arena: Tensor, backend: AdapterBackend, max_rows: int) -> None:
        (self._module,) = table.modules
        self._table = table
        self._arena = arena
        self._backend = backend
        self._grouping = Grouping(max_rows)

    def step(self, tensors: StepTensors) -> HeadStep | None:
        """None if no row that wants logits has an adapter on the head. Valid until the next step's."""
        slots = tensors.token_slots[tensors.logits_index.numpy()]
        used = np.unique(slots[slots >= 0])
        module = self._module
        adapted = module.host_index[used, :, 2].any(axis=1) | (module.host_affine[used] > 0)
        if not adapted.any():
            return None
        self._grouping.fill(slots, {int(slot): module.width(slot) for slot in used})
        return HeadStep(self, self._grouping)

    def apply(self, logits: Tensor, hidden: Tensor, grouping: Grouping) -> None:
        """See `HeadStep`."""
        self._backend.prepare([self._table], grouping)
        self._backend.apply(logits, hidden.contiguous(), self._arena, self._table, grouping)
