"""Turns a step's plan into the tensors that the model reads. No policy: the plan has decided everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gralora_kernels.grouping import Grouping
from gralora_runtime.plan import RowPlan, StepPlan


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Input of one forward pass, in host memory. Tokens of all rows are flattened."""

    input_ids: Tensor  # int64 [1, tokens]
    position_ids: Tensor  # int64 [1, tokens]
    kv_slots: Tensor  # int64 [tokens]: page * page_size + offset, where each token's keys and values go
    page_table: Tensor  # int32 [rows, max_pages]
    context_lens: Tensor  # int32 [rows], the step's own tokens included
    query_starts: Tensor  # int32 [rows + 1]
    max_query_len: int
    max_context_len: int
    logits_index: Tensor  # int64 [sampling rows]: the tokens whose logits are wanted
    grouping: Grouping

    def to(self, device: torch.device) -> StepTensors:
        """The same on `device`; itself if it is there."""
        if self.input_ids.device == device:
            return self
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return StepTensors(**(values | moved))


class StaleAdapterError(AssertionError):
    """A row's adapter slot was given to another adapter while the row still held it: our bug, never served."""


class BatchBuilder:
    """Builds `StepTensors`. `slot_generation` tells which stay an adapter slot is in now."""

    def __init__(
        self,
        *,
        max_num_tokens: int,
        page_size: int,
        slot_generation: Callable[[int], int],
    ) -> None:
        self._page_size = page_size
        self._slot_generation = slot_generation
        self._grouping = Grouping(max_num_tokens)

    def build(self, plan: StepPlan) -> StepTensors:
        """Raises `StaleAdapterError` if any slot no longer holds what its row was promised."""
        rows = plan.rows
        self._check_slots(rows)
        self._fill_grouping(rows)
        counts = [len(row.token_ids) for row in rows]
        starts = np.concatenate(([0], np.cumsum(counts)))
        positions = np.concatenate([np.arange(row.start, row.context_len) for row in rows])
        return StepTensors(
            input_ids=_tensor([t for row in rows for t in row.token_ids], torch.int64)[None],
            position_ids=_tensor(positions, torch.int64)[None],
            kv_slots=_tensor(np.concatenate([self._slots(r, r.start, r.context_len) for r in rows]), torch.int64),
            page_table=_tensor(_page_table(rows), torch.int32),
            context_lens=_tensor([row.context_len for row in rows], torch.int32),
            query_starts=_tensor(starts, torch.int32),
            max_query_len=max(counts),
            max_context_len=max(row.context_len for row in rows),
            logits_index=_tensor([starts[i + 1] - 1 for i, row in enumerate(rows) if row.samples], torch.int64),
            grouping=self._grouping,
        )

    def _check_slots(self, rows: Sequence[RowPlan]) -> None:
        for adapter in {row.adapter for row in rows}:
            if adapter.slot >= 0 and self._slot_generation(adapter.slot) != adapter.generation:
                raise StaleAdapterError(f"adapter slot {adapter.slot} does not hold generation {adapter.generation}")

    def _fill_grouping(self, rows: Sequence[RowPlan]) -> None:
        counts = [len(row.token_ids) for row in rows]
        token_slots = np.repeat(np.array([row.adapter.slot for row in rows], dtype=np.int32), counts)
        self._grouping.fill(token_slots, {row.adapter.slot: row.adapter.width for row in rows})

    def _slots(self, row: RowPlan, begin: int, end: int) -> np.ndarray:
        """KV slots of positions `begin .. end` of a row."""
        positions = np.arange(begin, end)
        return np.asarray(row.pages)[positions // self._page_size] * self._page_size + positions % self._page_size


def _tensor(values: Sequence[int] | np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=dtype)


def _page_table(rows: Sequence[RowPlan]) -> np.ndarray:
    table = np.zeros((len(rows), max(len(row.pages) for row in rows)), dtype=np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row.pages)] = row.pages
    return table
