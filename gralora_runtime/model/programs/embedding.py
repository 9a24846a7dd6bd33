"""What adapters make of the rows that a step's tokens have in the embedding. Knows no program."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import GroupTable
from gralora_runtime.model.programs.own_group import OwnGroup
from gralora_runtime.stepping.batch import StepTensors


@dataclass(frozen=True, slots=True)
class EmbeddingStep:
    """What one step needs of it."""

    adapters: EmbeddingAdapters
    grouping: Grouping

    def apply(self, rows: Tensor, ids: Tensor, factor: float) -> None:
        """rows [tokens, hidden], `factor` times the base embedding's of ids [tokens], become the adapters'."""
        self.adapters.apply(rows, ids, self.grouping, factor)


class EmbeddingAdapters:
    """Of one model."""

    def __init__(self, table: GroupTable, *, arena: Tensor, backend: AdapterBackend, max_tokens: int) -> None:
        self._group = OwnGroup(table, max_tokens)
        self._arena = arena
        self._backend = backend

    def step(self, tensors: StepTensors) -> EmbeddingStep | None:
        """None if no token has an adapter on the embedding. Valid until the next step's."""
        grouping = self._group.grouped(tensors.token_slots, tensors.grouping.slots)
        return None if grouping is None else EmbeddingStep(self, grouping)

    def apply(self, rows: Tensor, ids: Tensor, grouping: Grouping, factor: float) -> None:
        """See `EmbeddingStep`."""
        self._backend.look_up(rows, ids, self._arena, self._group.table, grouping, factor=factor)
