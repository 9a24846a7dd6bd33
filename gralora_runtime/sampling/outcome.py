"""What a step says of each row that samples: its next token, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass

from gralora_runtime.request import TokenLogprob


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one row; `logprob` only where the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class SamplingFailure:
    """No token can be chosen for this row. It concerns this request alone: its neighbours have their tokens."""

    problem: str


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Our own code failed on this row: a bug, which concerns this request alone."""

    cause: BaseException


Sampled = SampledToken | SamplingFailure | RowFailure
