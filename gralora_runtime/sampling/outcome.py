"""What a step says of each row that samples: its next token, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass

from gralora_runtime.errors import GraloraError
from gralora_runtime.request import TokenLogprob


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one row; `logprob` only where the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None = None
    completes: bool = False  # the answer is all that it has to match, and nothing may follow


@dataclass(frozen=True, slots=True)
class SamplingFailure:
    """No token can be chosen for this row. It concerns this request alone: its neighbours have their tokens."""

    problem: str


@dataclass(frozen=True, slots=True)
class MatchingFailure:
    """What the answer has to match leaves this request no token. That is the request's own doing, not its adapter's."""

    error: GraloraError


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Our own code failed on this row: a bug, which concerns this request alone."""

    cause: BaseException


Sampled = SampledToken | SamplingFailure | MatchingFailure | RowFailure
