"""What adapters do apart from the groups of linear layers: on the output head, on the embedding, in the place of norms,
and tokens that the base model does not have.

All of it is rare. A step in which nobody has any costs a look at its slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.tables import GroupTable
from gralora_runtime.model.programs.added import AddedStep, AddedTables, AddedTokens
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
    added: AddedStep | None = None

    def __bool__(self) -> bool:
        return any(one is not None for one in (self.head, self.embedding, self.norms, self.added))

    @property
    def changes_embedding(self) -> bool:
        return self.embedding is not None or self.added is not None

    def base_ids(self, ids: Tensor) -> Tensor:
        """What the base model's embedding is asked for in the place of ids [tokens]."""
        return ids if self.added is None else self.added.base_ids(ids)

    def embed(self, rows: Tensor, ids: Tensor, factor: float) -> None:
        """rows [tokens, hidden], `factor` times the base embedding's of `base_ids`, become the adapters'."""
        if self.embedding is not None:
            self.embedding.apply(rows, self.base_ids(ids), factor)
        if self.added is not None:
            self.added.embed(rows, ids, factor)

    def logits(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """logits [rows, vocab], which the base head made of hidden [rows, hidden], as the adapters': as wide as the
        largest vocabulary of the step. What a row does not have is for `hide`, once all is done to them."""
        if self.head is not None:
            self.head.apply(logits, hidden)
        return logits if self.added is None else self.added.widen(logits, hidden)

    def hide(self, logits: Tensor) -> Tensor:
        """In place: no row can be given a token that its adapter does not have."""
        return logits if self.added is None else self.added.hide(logits)


class Apart:
    """Of one model."""

    def __init__(
        self,
        *,
        head: GroupTable,
        embedding: GroupTable,
        norms: Mapping[str, GroupTable],
        added: AddedTables | None = None,
        arena: Tensor,
        backend: AdapterBackend,
        max_tokens: int,
    ) -> None:
        """`norms`: by name. `added`: None if adapters may have no tokens more. The backend is theirs alone: lists of
        one grouping are not those of another."""
        self.norm_tables = norms
        self._head = HeadAdapters(head, arena=arena, backend=backend, max_rows=max_tokens)
        self._embedding = EmbeddingAdapters(embedding, arena=arena, backend=backend, max_tokens=max_tokens)
        self._norms = NormAdapters(norms, arena=arena)
        self._added: AddedTokens | None = None
        if added is not None:
            self._added = AddedTokens(
                added, vocab_size=embedding.in_features, arena=arena, backend=backend, max_tokens=max_tokens
            )

    def step(self, tensors: StepTensors) -> ApartStep:
        """Valid until the next step's."""
        if not tensors.grouping.num_adapted:
            return ApartStep()
        return ApartStep(
            head=self._head.step(tensors),
            embedding=self._embedding.step(tensors),
            norms=self._norms.step(tensors),
            added=None if self._added is None else self._added.step(tensors),
        )
