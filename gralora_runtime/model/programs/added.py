"""Tokens that adapters have behind the base model's: their rows of the embedding, and their logits. Knows no program.

Programs see none of it: their tokens are the base model's, and so are the logits that they compute. A step in which
somebody has more gets what its tokens read put in place, and columns behind its logits: minus infinity for all rows but
those whose adapter has that token. So nobody is ever given another's token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import GroupTable
from gralora_runtime.model.programs.own_group import OwnGroup
from gralora_runtime.stepping.batch import StepTensors


@dataclass(frozen=True, slots=True)
class AddedTables:
    """Of the embedding's added rows, and of the head's: see `added_shapes`."""

    embedding: GroupTable
    head: GroupTable


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedStep:
    """What one step needs of them."""

    tokens: AddedTokens
    embedding: Grouping
    head: Grouping | None  # None: no row that wants logits has any
    counts: Tensor  # int64 [rows, 1], on the device: how many tokens each row that wants logits has more
    most: int  # of these

    def base_ids(self, ids: Tensor) -> Tensor:
        """ids, with one of the base model's in the place of each added token: what it reads is written over."""
        return torch.where(ids < self.tokens.vocab_size, ids, 0)

    def embed(self, rows: Tensor, ids: Tensor, factor: float) -> None:
        """rows [tokens, hidden] of added tokens among ids [tokens] become `factor` times the adapters'."""
        self.tokens.embed(rows, ids, factor, self.embedding)

    def widen(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """logits [rows, vocab], of hidden [rows, hidden], with `most` columns more."""
        if self.head is None:
            return logits
        return torch.cat([logits, self.tokens.logits(logits, hidden, self.head)[:, : self.most]], dim=1)

    def hide(self, logits: Tensor) -> Tensor:
        """In place, of what `widen` gave: minus infinity where a row has no such token."""
        added = logits[:, self.tokens.vocab_size :]
        added.masked_fill_(torch.arange(added.shape[1], device=logits.device) >= self.counts, -math.inf)
        return logits


class AddedTokens:
    """Of one model."""

    def __init__(
        self, tables: AddedTables, *, vocab_size: int, arena: Tensor, backend: AdapterBackend, max_tokens: int
    ) -> None:
        self.vocab_size = vocab_size
        self._embedding, self._head = (OwnGroup(table, max_tokens) for table in (tables.embedding, tables.head))
        self._arena = arena
        self._backend = backend

    def step(self, tensors: StepTensors) -> AddedStep | None:
        """None if no token has an adapter with more tokens. Valid until the next step's."""
        used = tensors.grouping.slots
        embedding = self._embedding.grouped(tensors.token_slots, used)
        if embedding is None:
            return None
        slots = tensors.token_slots[tensors.logits_index.numpy()]
        head = self._head.grouped(slots, used)
        (module,) = self._head.table.modules
        counts = torch.from_numpy(module.host_index[slots, 0, 2] * (slots >= 0))[:, None]
        most = int(counts.max()) if len(slots) else 0
        return AddedStep(tokens=self, embedding=embedding, head=head, counts=counts.to(self._arena.device), most=most)

    def embed(self, rows: Tensor, ids: Tensor, factor: float, grouping: Grouping) -> None:
        """See `AddedStep`."""
        inputs = (ids - (self.vocab_size - 1)).clamp_(0, self._embedding.table.in_features - 1)
        self._backend.look_up(rows, inputs, self._arena, self._embedding.table, grouping, factor=factor)

    def logits(self, like: Tensor, hidden: Tensor, grouping: Grouping) -> Tensor:
        """[rows, most that any adapter may have more]"""
        table = self._head.table
        added = like.new_zeros(len(like), table.out_features)
        self._backend.prepare([table], grouping)
        self._backend.apply(added, hidden.contiguous(), self._arena, table, grouping)
        return added
