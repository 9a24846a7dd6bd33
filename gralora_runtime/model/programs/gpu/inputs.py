"""The tensors of a step in the GPU's memory, at addresses that never change. Knows no model and no kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gralora_kernels.triton_ops.memory import staged
from gralora_kernels.triton_ops.tokens import follow
from gralora_runtime.stepping.batch import StepTensors

NOWHERE = -1  # the KV slot of a token that is padding


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStep:
    """Input of one forward pass, on the device. A row whose context is 0 is padding, with a token of its own."""

    token_ids: Tensor  # int32 [tokens]
    positions: Tensor  # int32 [tokens]
    kv_slots: Tensor  # int64 [tokens]
    logits_index: Tensor  # int64 [wanted]: the tokens whose logits are computed
    query_starts: Tensor  # int32 [rows + 1]
    context_lens: Tensor  # int32 [rows]
    page_table: Tensor  # int32 [rows, pages]


class StepInputs:
    """Room for steps of so many tokens and rows."""

    def __init__(self, *, max_tokens: int, max_rows: int, max_pages: int, device: torch.device) -> None:
        self._device = device
        sizes = {
            "kv_slots": 2 * max_tokens,  # of 8 bytes, so they come first
            "logits_index": 2 * max_tokens,
            "token_ids": max_tokens,
            "follows": max_tokens,
            "positions": max_tokens,
            "query_starts": max_rows + 1,
            "context_lens": max_rows,
        }
        ends = np.cumsum([-(-size // 4) * 4 for size in sizes.values()]).tolist()
        starts = [0, *ends[:-1]]
        self._parts = dict(zip(sizes, zip(starts, sizes.values(), strict=True), strict=True))
        self._words = torch.zeros(ends[-1], dtype=torch.int32, device=device)
        self._page_table = torch.zeros(max_rows, max_pages, dtype=torch.int32, device=device)

    def load(self, step: StepTensors, newest: Tensor | None = None) -> DeviceStep:
        """Send a step as it is, without waiting for the device. If it wants no logits, it gets its first token's.

        `newest` int32: what the step before chose, of which tokens that follow are taken.
        """
        wanted = step.logits_index if len(step.logits_index) else torch.zeros(1, dtype=torch.int64)
        return self._send(step, len(step.context_lens), len(step.input_ids[0]), wanted, newest)

    def load_padded(self, step: StepTensors, rows: int, newest: Tensor | None = None) -> DeviceStep:
        """Send a step of single tokens as one of `rows` rows, all of which want their logits."""
        return self._send(step, rows, rows, torch.arange(rows), newest)

    def empty(self, rows: int) -> DeviceStep:
        """A step of padding alone."""
        return self._view(rows, rows, rows)

    def _send(self, step: StepTensors, rows: int, tokens: int, wanted: Tensor, newest: Tensor | None) -> DeviceStep:
        words = torch.from_numpy(np.zeros(len(self._words), np.int32))
        values = {
            "kv_slots": step.kv_slots,
            "logits_index": wanted,
            "token_ids": step.input_ids[0],
            "follows": step.follows,
            "positions": step.position_ids[0],
            "query_starts": step.query_starts,
            "context_lens": step.context_lens,
        }
        self._part(words, "kv_slots").fill_(NOWHERE)
        self._part(words, "query_starts")[:] = torch.arange(self._parts["query_starts"][1])
        for name, value in values.items():
            self._part(words, name)[: len(value)] = value
        self._words.copy_(staged(words, self._device), non_blocking=True)
        table = step.page_table
        here = self._page_table[: len(table), : table.shape[1]]
        here.copy_(staged(table, self._device), non_blocking=True)
        if newest is not None and bool((step.follows >= 0).any()):
            count = len(step.follows)
            follow(self._part(self._words, "token_ids")[:count], self._part(self._words, "follows")[:count], newest)
        return self._view(rows, tokens, len(wanted))

    def _view(self, rows: int, tokens: int, wanted: int) -> DeviceStep:
        def part(name: str, count: int) -> Tensor:
            return self._part(self._words, name)[:count]

        return DeviceStep(
            token_ids=part("token_ids", tokens),
            positions=part("positions", tokens),
            kv_slots=part("kv_slots", tokens),
            logits_index=part("logits_index", wanted),
            query_starts=part("query_starts", rows + 1),
            context_lens=part("context_lens", rows),
            page_table=self._page_table[:rows],
        )

    def _part(self, words: Tensor, name: str) -> Tensor:
        start, size = self._parts[name]
        part = words[start : start + size]
        return part.view(torch.int64) if name in ("kv_slots", "logits_index") else part
