"""What one step will do, decided by the scheduler and read by everybody after it. Plain frozen values, no torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """The pool slot that a row reads, and which of its stays: the slot may not have been reused since."""

    slot: int  # -1: base model
    generation: int
    width: int  # columns of the widest u = sum of r*k over its entries


class RowPlan(NamedTuple):
    """Tokens `start .. start + len(token_ids)` of one sequence."""

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    pages: tuple[int, ...]  # all pages of the sequence so far, in order
    adapter: AdapterUse
    samples: bool  # the last of these tokens is the newest of the sequence: its logits choose the next one
    seat: int  # a number below `max_num_seqs` that no other running sequence has
    stay: int = 0  # the sequence's admission that this row belongs to: its pages are others after the next one
    follows: int = -1  # its one token is what this sampling row of the step before chose, unknown as yet; -1: no
    adapted_from: int = 0  # of the sequence: its tokens before this one are the base model's, whatever `adapter` says

    @property
    def context_len(self) -> int:
        return self.start + len(self.token_ids)


NEVER = sys.maxsize  # of `adapted_from`: all its tokens are the base model's
UNKNOWN = (0,)  # the tokens of a row that follows: any valid one, which the program replaces


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Rows that decode (one token each) come before rows that prefill."""

    rows: tuple[RowPlan, ...]
    num_decode_rows: int

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)
