"""Turns a step's plan into the tensors that the model reads. No policy: the plan has decided everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gralora_kernels.grouping import Grouping
from gralora_runtime.plan import RowPlan, StepPlan

IntRow = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Input of one forward pass, in host memory. Tokens of all rows are flattened."""

    input_ids: Tensor  # int64 [1, tokens]
    follows: Tensor  # int64 [tokens]: where it is not -1, the token is what that sampling row of the step before chose
    position_ids: Tensor  # int64 [1, tokens]
    kv_slots: Tensor  # int64 [tokens]: page * page_size + offset, where each token's keys and values go
    page_table: Tensor  # int32 [rows, max_pages]
    context_lens: Tensor  # int32 [rows], the step's own tokens included
    query_starts: Tensor  # int32 [rows + 1]
    max_query_len: int
    max_context_len: int
    logits_index: Tensor  # int64 [sampling rows]: the tokens whose logits are wanted
    token_slots: npt.NDArray[np.int32]  # [tokens]: the adapter slot of each; -1: none
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
    """Builds `StepTensors`. `slot_generation` tells which stay an adapter slot is in now.

    What a step's tensors are views of is used anew two steps later: a step may be built while the one before runs.
    """

    def __init__(
        self,
        *,
        max_num_tokens: int,
        page_size: int,
        slot_generation: Callable[[int], int],
    ) -> None:
        self._page_size = page_size
        self._slot_generation = slot_generation
        self._groupings = (Grouping(max_num_tokens), Grouping(max_num_tokens))
        self._tables = PageTables()

    def build(self, plan: StepPlan) -> StepTensors:
        """Raises `StaleAdapterError` if any slot no longer holds what its row was promised."""
        rows = plan.rows
        self._check_slots(rows)
        counts = np.array([len(row.token_ids) for row in rows], np.int32)
        begins = np.array([row.start for row in rows], np.int32)
        starts = np.zeros(len(rows) + 1, np.int32)
        counts.cumsum(out=starts[1:])
        row_of = np.repeat(np.arange(len(rows)), counts)  # [tokens]
        positions = np.arange(len(row_of)) + (begins - starts[:-1])[row_of]
        table = self._tables.of(rows)
        pages = table[row_of, positions // self._page_size].astype(np.int64)
        lengths = begins + counts
        token_slots = np.array([row.adapter.slot for row in rows], np.int32)[row_of]
        if any(row.start < row.adapted_from for row in rows):
            token_slots[positions < np.array([row.adapted_from for row in rows])[row_of]] = -1
        return StepTensors(
            input_ids=torch.tensor([[token for row in rows for token in row.token_ids]]),
            follows=torch.from_numpy(np.array([row.follows for row in rows])[row_of]),
            position_ids=torch.from_numpy(positions)[None],
            kv_slots=torch.from_numpy(pages * self._page_size + positions % self._page_size),
            page_table=torch.from_numpy(table),
            context_lens=torch.from_numpy(lengths),
            query_starts=torch.from_numpy(starts),
            max_query_len=int(counts.max()),
            max_context_len=int(lengths.max()),
            logits_index=torch.from_numpy(starts[1:][[row.samples for row in rows]].astype(np.int64) - 1),
            token_slots=token_slots,
            grouping=self._group(rows, token_slots),
        )

    def _check_slots(self, rows: Sequence[RowPlan]) -> None:
        for row in rows:
            slot, generation = row.adapter.slot, row.adapter.generation
            if slot >= 0 and self._slot_generation(slot) != generation:
                raise StaleAdapterError(f"adapter slot {slot} does not hold generation {generation}")

    def _group(self, rows: Sequence[RowPlan], token_slots: npt.NDArray[np.int32]) -> Grouping:
        self._groupings = grouping, _ = self._groupings[::-1]
        grouping.fill(token_slots, {row.adapter.slot: row.adapter.width for row in rows})
        return grouping


class PageTables:
    """The pages of each seat, written when they change."""

    def __init__(self) -> None:
        self._table = np.zeros((0, 0), np.int32)  # [seats, pages]; 0 behind the last page
        self._pages: list[tuple[int, ...]] = []  # what is written, by seat

    def of(self, rows: Sequence[RowPlan]) -> IntRow:
        """The page table of these rows, int32 [rows, most pages of one of them]: a copy."""
        seats, most = [row.seat for row in rows], 0
        self._make_room(1 + max(seats), max(len(row.pages) for row in rows))
        for row in rows:
            if self._pages[row.seat] is not row.pages:
                self._write(row.seat, row.pages)
            most = max(most, len(row.pages))
        return self._table[seats, :most]

    def _write(self, seat: int, pages: tuple[int, ...]) -> None:
        self._table[seat, : len(pages)] = pages
        self._table[seat, len(pages) : len(self._pages[seat])] = 0
        self._pages[seat] = pages

    def _make_room(self, seats: int, pages: int) -> None:
        before = self._table
        if seats > before.shape[0] or pages > before.shape[1]:
            self._table = np.zeros((max(seats, before.shape[0]), max(2 * pages, before.shape[1])), np.int32)
            self._table[: before.shape[0], : before.shape[1]] = before
            self._pages += [()] * (seats - len(self._pages))
