"""When a request would have its first token, and its last, if it came now. From what steps and requests took lately.

Nothing is told before there is anything to tell it from. Who would be alone is always let in: where it is slower than
the forecast, nothing else would ever show that.
"""

from __future__ import annotations

from dataclasses import dataclass

from gralora_runtime.backlog import Backlog, Place, TenantBacklog
from gralora_runtime.plan import StepPlan

LATELY = 0.1  # weight of the newest of a moving mean
SHORTEST_RETRY_S = 0.05


class Mean:
    """A moving mean, None before the first value."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + LATELY * (value - self.value)


class StepTimes:
    """What steps took lately. Written by the engine's thread, read by any: a mean is one object."""

    def __init__(self) -> None:
        self.decode_s = Mean()  # a step of no prompts
        self.prompt_token_s = Mean()  # a prompt's token, beside those that decode

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step was computed."""
        tokens = plan.num_tokens - plan.num_decode_rows
        if not tokens:
            self.decode_s.add(seconds)
            return
        decoding_s = (self.decode_s.value or 0.0) if plan.num_decode_rows else 0.0
        # A step costs something however few tokens it has, which is not theirs.
        self.prompt_token_s.add(max(seconds - decoding_s, 0.0) / tokens)


@dataclass(frozen=True, slots=True)
class Estimate:
    """In seconds from now."""

    first_token_s: float
    last_token_s: float


class Forecast:
    """Reads the backlog, and learns from requests. Lives on the event loop's thread."""

    def __init__(self, backlog: Backlog, steps: StepTimes, *, max_num_seqs: int) -> None:
        self._backlog = backlog
        self._steps = steps
        self._max_num_seqs = max_num_seqs
        self._row_s = Mean()  # from a request's first token to its last
        self._outputs = Mean()  # tokens of an answer
        self._token_s = Mean()  # between two tokens of an answer

    def ended(self, *, since_first_token_s: float, num_output: int) -> None:
        """A request had all its tokens."""
        self._row_s.add(since_first_token_s)
        self._outputs.add(float(num_output))
        if num_output > 1:
            self._token_s.add(since_first_token_s / (num_output - 1))

    def estimate(self, place: Place, *, num_prompt: int, max_tokens: int | None) -> Estimate | None:
        """For a request that has entered the backlog; None: there is nothing to tell it from, or nobody else."""
        decode_s, prompt_token_s = self._steps.decode_s.value, self._steps.prompt_token_s.value
        if self._backlog.requests < 2 or decode_s is None or prompt_token_s is None or self._row_s.value is None:
            return None
        ahead_s, waits = self._ahead_s(place, prompt_token_s)
        first_s = ahead_s + num_prompt * prompt_token_s + decode_s
        outputs = self._outputs.value or 1.0
        expected = outputs if max_tokens is None else min(outputs, float(max_tokens))
        # What others' prompts cost those that decode shows where somebody waits; where nobody does, it is past.
        token_s = max(decode_s, self._token_s.value or 0.0) if waits else decode_s
        return Estimate(first_s, first_s + max(0.0, expected - 1.0) * token_s)

    def retry_s(self, tenant: str, weight: float) -> float:
        """Until one request of the tenant more has had its turn."""
        rows = self._rows(self._backlog.line(tenant, weight))
        return max(SHORTEST_RETRY_S, (self._row_s.value or 1.0) / max(rows, 1.0))

    def _rows(self, line: TenantBacklog) -> float:
        """That a tenant may have: its share, and what the others do not want."""
        others = self._backlog.requests - line.requests
        weights = self._backlog.weight + (0.0 if line.requests else line.weight)
        return max(self._max_num_seqs * line.weight / weights, float(self._max_num_seqs - others))

    def _ahead_s(self, place: Place, prompt_token_s: float) -> tuple[float, bool]:
        """Until it is this request's turn, and whether others wait."""
        line = place.line
        rows = self._rows(line)
        row_s = max(0.0, line.requests - rows) * (self._row_s.value or 0.0) / rows
        # Prompts of other tenants come in turn with its own, a token for a token.
        own, all_tokens = line.waiting_tokens - place.tokens, self._backlog.waiting_tokens - place.tokens
        return max(row_s, min(2 * own, all_tokens) * prompt_token_s), self._backlog.waiting > 1
