"""What adapters make of the output head's product, for the rows of a step that want logits. Knows no program."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import GroupTable
from gralora_runtime.model.programs.own_group import OwnGroup
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
    """Of one model."""

    def __init__(self, table: GroupTable, *, arena: Tensor, backend: AdapterBackend, max_rows: int) -> None:
        self._group = OwnGroup(table, max_rows)
        self._arena = arena
        self._backend = backend

    def step(self, tensors: StepTensors) -> HeadStep | None:
        """None if no row that wants logits has an adapter on the head. Valid until the next step's."""
        grouping = self._group.grouped(tensors.token_slots[tensors.logits_index.numpy()], tensors.grouping.slots)
        return None if grouping is None else HeadStep(self, grouping)

    def apply(self, logits: Tensor, hidden: Tensor, grouping: Grouping) -> None:
        """See `HeadStep`."""
        self._backend.prepare([self._group.table], grouping)
        self._backend.apply(logits, hidden.contiguous(), self._arena, self._group.table, grouping)
