"""When a request would have its first token, and its last, if it came now. From what steps and requests took lately.

Nothing is told before there is anything to tell it from. Who would be alone is always let in: where it is slower than
the forecast, nothing else would ever show that.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from gralora_runtime.backlog import Backlog, Place, TenantBacklog
from gralora_runtime.plan import StepPlan
from gralora_runtime.request import StoppingParams

LATELY = 0.1  # weight of the newest of a moving mean
SHORTEST_RETRY_S, LONGEST_RETRY_S = 0.05, 30.0
REMEMBERED = 1024  # tenants whose answers' lengths are


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
        self.decode_s = Mean()  # of no prompts
        self.step_s = Mean()  # of all in which somebody decodes: what it waits for its next token
        self.prompt_token_s = Mean()  # of a prompt's token, beside those that decode

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step was computed."""
        tokens = plan.num_tokens - plan.num_decode_rows
        if plan.num_decode_rows:
            self.step_s.add(seconds)
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


@dataclass(slots=True)
class _Lengths:
    """Of answers: how many tokens, and how many of those that they might have had."""

    tokens: Mean = field(default_factory=Mean)
    share: Mean = field(default_factory=Mean)


class Forecast:
    """Reads the backlog, and learns from requests. Lives on the event loop's thread."""

    def __init__(self, backlog: Backlog, steps: StepTimes, *, max_num_seqs: int) -> None:
        self._backlog = backlog
        self._steps = steps
        self._max_num_seqs = max_num_seqs
        self._all = _Lengths()
        self._of_tenants: OrderedDict[str, _Lengths] = OrderedDict()  # the last to be used last

    def learn(self, tenant: str, *, num_output: int, max_tokens: int, whole: bool) -> None:
        """From a request that has ended; `whole`: not because its time was over, when it might have had more."""
        for lengths in (self._all, self._lengths(tenant)):
            for mean, value in ((lengths.tokens, float(num_output)), (lengths.share, num_output / max_tokens)):
                if whole or value > (mean.value or 0.0):
                    mean.add(value)

    def estimate(self, place: Place, stopping: StoppingParams, *, num_prompt: int) -> Estimate | None:
        """For a request that has entered the backlog; None: there is nothing to tell it from, or nobody else."""
        decode_s, prompt_token_s = self._steps.decode_s.value, self._steps.prompt_token_s.value
        if self._backlog.requests < 2 or decode_s is None or prompt_token_s is None or self._all.tokens.value is None:
            return None
        first_s = self._ahead_s(place, prompt_token_s) + num_prompt * prompt_token_s + decode_s
        # What others' prompts cost those that decode shows where somebody waits; where nobody does, it is past.
        token_s = self._token_s if self._backlog.waiting > 1 else decode_s
        outputs = self._outputs(place.line.tenant, stopping)
        return Estimate(first_s, first_s + max(0.0, outputs - 1.0) * token_s)

    def retry_s(self, line: TenantBacklog, soonest_s: float, now_s: float) -> float:
        """When to come again, not before `soonest_s` from now. Each is told a time of its own, a turn after the last:
        if all came at once, all but one would come in vain.
        """
        turn_s = self._row_s(line.tenant) / max(1.0, self._rows(line))
        line.returns_at_s = max(now_s + soonest_s, line.returns_at_s + turn_s)
        return min(max(SHORTEST_RETRY_S, line.returns_at_s - now_s), LONGEST_RETRY_S)

    @property
    def _token_s(self) -> float:
        return max(self._steps.decode_s.value or 0.0, self._steps.step_s.value or 0.0)

    def _row_s(self, tenant: str) -> float:
        """Between a request's first token and its last."""
        outputs = self._lengths(tenant).tokens.value or self._all.tokens.value or 1.0
        return outputs * self._token_s

    def _outputs(self, tenant: str, stopping: StoppingParams) -> float:
        """How many tokens an answer will have: of its tenant's, or else of all, and never more than it may."""
        most = float("inf") if stopping.max_tokens is None else float(stopping.max_tokens)
        if stopping.ignore_eos and stopping.max_tokens is not None:
            return most
        own = self._lengths(tenant).tokens.value
        if own is not None:
            return min(own, most)
        if stopping.max_tokens is not None and self._all.share.value is not None:
            return self._all.share.value * most
        return self._all.tokens.value or 1.0

    def _lengths(self, tenant: str) -> _Lengths:
        lengths = self._of_tenants.pop(tenant, None) or _Lengths()
        self._of_tenants[tenant] = lengths
        if len(self._of_tenants) > REMEMBERED:
            self._of_tenants.popitem(last=False)
        return lengths

    def _rows(self, line: TenantBacklog) -> float:
        """That a tenant may have: its share, and what the others do not want."""
        others = self._backlog.requests - line.requests
        weights = self._backlog.weight + (0.0 if line.requests else line.weight)
        return max(self._max_num_seqs * line.weight / weights, float(self._max_num_seqs - others))

    def _ahead_s(self, place: Place, prompt_token_s: float) -> float:
        """Until it is this request's turn."""
        line = place.line
        rows = self._rows(line)
        row_s = max(0.0, line.requests - rows) * self._row_s(line.tenant) / rows
        # Prompts of other tenants come in turn with its own, a token for a token.
        own, all_tokens = line.waiting_tokens - place.tokens, self._backlog.waiting_tokens - place.tokens
        return max(row_s, min(2 * own, all_tokens) * prompt_token_s)
