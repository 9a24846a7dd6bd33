"""Chooses on the device where some rows have more tokens than the base model. Rules and histories are `device`'s.

Whoever has the base model's vocabulary is sampled as if nobody had more: by the same sampler, from rows of the same
width, so its bits stay. Those that have more have a sampler of their own, as wide as any of them may be. It is made
when the first of them comes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from gralora_runtime.sampling.device import DeviceSampler, Results
from gralora_runtime.sampling.outcome import Sampled
from gralora_runtime.sampling.state import SamplerState


class Choices(Protocol):
    """What a step chose, on its way to the host."""

    def read(self) -> list[Sampled]:
        """See `Results.read`."""


class SamplerOfWidths:
    """For steps of at most `max_rows` rows. Calls belong on the stream of the steps."""

    def __init__(self, *, vocab_size: int, max_added_tokens: int, max_rows: int, device: torch.device) -> None:
        self.base = DeviceSampler(vocab_size=vocab_size, max_rows=max_rows, device=device)
        self._vocab_size, self._widest = vocab_size, vocab_size + max_added_tokens
        self._max_rows, self._device = max_rows, device
        self._wide: DeviceSampler | None = None
        self._tokens = torch.zeros(max_rows, dtype=torch.int32, device=device)  # of steps that had both
        self._last = self.base.tokens

    @property
    def tokens(self) -> Tensor:
        """int32 [max_rows], on the device: what the rows of the last step chose."""
        return self._last

    def warm_up(self, dtype: torch.dtype) -> None:
        """See `DeviceSampler`."""
        self.base.warm_up(dtype)

    def sample(self, logits: Tensor, states: Sequence[SamplerState], seats: Sequence[int]) -> Choices:
        """As `DeviceSampler.sample`, of rows [rows, vocab or more]: those of the base model end with its vocabulary."""
        if logits.shape[1] == self._vocab_size:
            self._last = self.base.tokens
            return self.base.sample(logits, states, seats)
        wide = nn.functional.pad(logits, (0, self._widest - logits.shape[1]), value=-math.inf)
        with_more = [row for row, state in enumerate(states) if state.vocab_size > self._vocab_size]
        others = sorted(set(range(len(states))).difference(with_more))
        parts = []
        try:
            for sampler, rows, values in (
                (self.base, others, logits[:, : self._vocab_size]),
                (self._wide_sampler(), with_more, wide),
            ):
                at = torch.tensor(rows, dtype=torch.int64).to(self._device)
                own = [states[row] for row in rows], [seats[row] for row in rows]
                parts.append((rows, sampler.sample(values[at], *own)))
                self._tokens[at] = sampler.tokens[: len(rows)]
        except BaseException:  # what is kept of one of them may be a token ahead
            self.base.forget(seats)
            self._wide_sampler().forget(seats)
            raise
        self._last = self._tokens
        return _Together(parts)

    def _wide_sampler(self) -> DeviceSampler:
        if self._wide is None:
            self._wide = DeviceSampler(vocab_size=self._widest, max_rows=self._max_rows, device=self._device)
        return self._wide


class _Together:
    """What samplers chose for rows [rows] of one step."""

    def __init__(self, parts: Sequence[tuple[Sequence[int], Results]]) -> None:
        self._parts = parts

    def read(self) -> list[Sampled]:
        """See `Results.read`."""
        found = {row: one for rows, results in self._parts for row, one in zip(rows, results.read(), strict=True)}
        return [found[row] for row in sorted(found)]
