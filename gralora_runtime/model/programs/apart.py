"""What adapters do apart from the groups of linear layers: on the output head, on the embedding, in the place of norms.

All of it is rare. A step in which nobody has any costs a look at its slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.tables import GroupTable
from gralora_runtime.model.programs.embedding import EmbeddingAdapters, EmbeddingStep
from gralora_runtime.model.programs.head import HeadAdapters, HeadStep
from gralora_runtime.model.programs.norms import NormAdapters, NormStep
from gralora_runtime.stepping.batch import StepTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ApartStep:
    """One step's. None: nobody in it has any."""

    head: HeadStep | None = None
    embedding: EmbeddingStep | None = None
    norms: NormStep | None = None

    def __bool__(self) -> bool:
        return any(one is not None for one in (self.head, self.embedding, self.norms))


class Apart:
    """Of one model."""

    def __init__(
        self,
        *,
        head: GroupTable,
        embedding: GroupTable,
        norms: Mapping[str, GroupTable],
        arena: Tensor,
        backend: AdapterBackend,
        max_tokens: int,
    ) -> None:
        """`norms`: by name. The backend is theirs alone: lists of one grouping are not those of another."""
        self.norm_tables = norms
        self._head = HeadAdapters(head, arena=arena, backend=backend, max_rows=max_tokens)
        self._embedding = EmbeddingAdapters(embedding, arena=arena, backend=backend, max_tokens=max_tokens)
        self._norms = NormAdapters(norms, arena=arena)

    def step(self, tensors: StepTensors) -> ApartStep:
        """Valid until the next step's."""
        if not tensors.grouping.num_adapted:
            return ApartStep()
        return ApartStep(
            head=self._head.step(tensors), embedding=self._embedding.step(tensors), norms=self._norms.step(tensors)
        )
