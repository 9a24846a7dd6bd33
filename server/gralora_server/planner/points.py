"""Which waves are measured, and what their times say of a step's cost. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gralora_server.planner.profile import StepPoint

SHORT, LONG = 16, 512  # tokens of prompts
CROWD = 8  # rows when context is measured


@dataclass(frozen=True, slots=True)
class Point:
    """`rows` requests with prompts of `prompt` tokens: the time of a step in which all decode, or of a first token."""

    rows: int
    prompt: int = SHORT
    adapted: bool = False  # with an adapter each, as long as there are enough; otherwise for the base model
    first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """As in `Profile`."""

    step_s: tuple[StepPoint, ...]
    adapter_byte_s: float
    adapter_token_byte_s: float
    context_token_s: float
    prefill_context_s: float
    request_s: float


@dataclass(frozen=True, slots=True)
class Points:
    """Of a server that computes so many rows and tokens in a step, and takes prompts of up to `longest` tokens."""

    max_num_seqs: int
    max_num_batched_tokens: int
    longest: int = LONG

    def all(self) -> list[Point]:
        found = [Point(rows, adapted=adapted) for rows in self._rows() for adapted in (False, True)]
        found += [Point(1, tokens, adapted, first=True) for tokens in self._prompts() for adapted in (False, True)]
        return [*found, self._lone, self._crowd, self._long_crowd, self._long_prompt]

    def costs(self, times_s: Mapping[Point, float], adapter_bytes: Sequence[int]) -> Costs:
        """`adapter_bytes`: of the adapters in the order in which waves use them."""
        base = {rows: times_s[Point(rows)] for rows in self._rows()}
        # A prompt of one token is a step like one that decodes; what the first token takes longer is the way.
        request_s = max(0.0, times_s[self._lone] - base[1])
        base |= {tokens: times_s[Point(1, tokens, first=True)] - request_s for tokens in self._prompts()}
        for fewer, more in pairwise(sorted(base)):
            base[more] = max(base[fewer], base[more])  # whatever a disturbed wave says
        sums = {rows: sum(adapter_bytes[:rows]) for rows in self._rows()}
        byte_s = _slope((sums[rows], times_s[Point(rows, adapted=True)] - base[rows]) for rows in self._rows())
        one = adapter_bytes[0]
        token_byte_s = _slope(
            (one * (n - 1), times_s[Point(1, n, adapted=True, first=True)] - request_s - base[n] - one * byte_s)
            for n in self._prompts()
        )
        context = (self._long_crowd.prompt - SHORT) * self._crowd.rows
        return Costs(
            step_s=tuple(StepPoint(tokens=tokens, seconds=base[tokens]) for tokens in sorted(base)),
            adapter_byte_s=byte_s,
            adapter_token_byte_s=token_byte_s,
            context_token_s=_slope([(context, times_s[self._long_crowd] - times_s[self._crowd])]),
            prefill_context_s=self._prefill_context_s(times_s[self._long_prompt] - request_s, base),
            request_s=request_s,
        )

    def _prefill_context_s(self, prompt_s: float, base: Mapping[int, float]) -> float:
        """From a prompt that takes several chunks; 0 where none is that long."""
        starts = range(0, self._long_prompt.prompt, self.max_num_batched_tokens)
        chunks = [(start, min(self.max_num_batched_tokens, self._long_prompt.prompt - start)) for start in starts]
        if any(count not in base for _, count in chunks):
            return 0.0
        return _slope([(sum(start * count for start, count in chunks), prompt_s - sum(base[n] for _, n in chunks))])

    @property
    def _lone(self) -> Point:
        return Point(1, 1, first=True)

    @property
    def _crowd(self) -> Point:
        return Point(min(CROWD, self.max_num_seqs))

    @property
    def _long_crowd(self) -> Point:
        return Point(self._crowd.rows, self.longest)

    @property
    def _long_prompt(self) -> Point:
        """Of whole chunks, as far as there is room."""
        whole = self.longest // self.max_num_batched_tokens * self.max_num_batched_tokens
        return Point(1, whole or self.longest, first=True)

    def _rows(self) -> list[int]:
        return list(_powers_of_two(self.max_num_seqs))

    def _prompts(self) -> list[int]:
        most = min(self.max_num_batched_tokens, self.longest)
        return [tokens for tokens in _powers_of_two(most) if tokens > self.max_num_seqs]


def _slope(points: Iterable[tuple[float, float]]) -> float:
    """Of the line through the origin that is nearest to points (x, y); never below 0, as no cost is."""
    xy, xx = 0.0, 0.0
    for x, y in points:
        xy, xx = xy + x * y, xx + x * x
    return max(0.0, xy / xx) if xx else 0.0


def _powers_of_two(most: int) -> Iterator[int]:
    """From 1; `most` comes last, whether it is one or not."""
    value = 1
    while value < most:
        yield value
        value *= 2
    yield most
