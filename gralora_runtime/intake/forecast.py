"""When a request would have its first token, and its last, if it came now. From what steps and requests took lately.

A step takes so long, longer by each row that decodes, and by each token of a prompt. So prompts delay the tokens of
those that decode: prompts that wait already, and those that will come, which are thought to be as many as lately. How
far off forecasts were makes the next ones more cautious, or less: nine in ten are to be in time.

Nothing is told before there is anything to tell it from. Who would be alone is always let in: where it is slower than
the forecast, nothing else would ever show that.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from gralora_runtime.intake.backlog import Backlog, Place, TenantBacklog
from gralora_runtime.observation.step_times import StepCost, StepTimes
from gralora_runtime.request import StoppingParams
from gralora_runtime.scheduling.fairness import CROWD, SHARE_BESIDE_OTHERS

LATELY = 0.1  # weight of the newest of a moving mean
REMEMBERED = 1024  # tenants whose answers' lengths are
RECENT_S = 2.0  # over which the prompts that were taken on are counted
RATE_S = 5.0  # and their number
MOST_FOR_PROMPTS = 0.95  # of the time
IN_TIME = 0.9  # of those that are let in
CAUTION_STEP = 0.1
LEAST_CAUTION, MOST_CAUTION = 1.0, 4.0  # times the forecast


class Mean:
    """A moving mean, None before the first value."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + LATELY * (value - self.value)


@dataclass(frozen=True, slots=True)
class Estimate:
    """In seconds from now."""

    first_token_s: float
    last_token_s: float
    caution: float = 1.0  # by which both are longer than steps and answers say


@dataclass(slots=True)
class _Lengths:
    """Of answers: how many tokens, and how many of those that they might have had."""

    tokens: Mean = field(default_factory=Mean)
    share: Mean = field(default_factory=Mean)


class Forecast:
    """Reads the backlog, and learns from requests. Lives on the event loop's thread."""

    def __init__(self, backlog: Backlog, steps: StepTimes, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._backlog = backlog
        self._steps = steps
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._caution = LEAST_CAUTION
        self._recent_tokens = 0.0  # of prompts that were taken on, each by how recently
        self._recent_requests = 0.0
        self._counted_at_s = 0.0
        self._all = _Lengths()
        self._of_tenants: OrderedDict[str, _Lengths] = OrderedDict()  # the last to be used last

    def learn(self, tenant: str, *, num_output: int, max_tokens: int, whole: bool) -> None:
        """From a request that has ended; `whole`: not because its time was over, when it might have had more."""
        for lengths in (self._all, self._lengths(tenant)):
            for mean, value in ((lengths.tokens, float(num_output)), (lengths.share, num_output / max_tokens)):
                if whole or value > (mean.value or 0.0):
                    mean.add(value)

    def take_on(self, num_prompt: int, now_s: float) -> None:
        """A request with so many tokens was let in."""
        self._recent_tokens = self._recent(now_s) + num_prompt
        self._recent_requests = self._lately(now_s) + 1.0
        self._counted_at_s = now_s

    def compare(self, estimate: Estimate, took_s: float, *, ended: bool) -> None:
        """What became of a forecast; `ended` False: it would have taken longer."""
        was_enough = ended and took_s <= estimate.last_token_s * self._caution / estimate.caution
        change = (1.0 - IN_TIME) if was_enough else -IN_TIME
        self._caution = min(max(self._caution - CAUTION_STEP * change, LEAST_CAUTION), MOST_CAUTION)

    def estimate(
        self, place: Place, stopping: StoppingParams, *, num_prompt: int, now_s: float, others: float = 0.0
    ) -> Estimate | None:
        """For a request that has entered the backlog; None: there is nothing to tell it from, or nobody else.

        `others`: of its tenant, which are to come meanwhile.
        """
        cost = self._steps.cost()
        if self._backlog.requests < 2:
            # Whatever made forecasts too rosy is over. Nothing else would ever say so: who is refused takes no time.
            self._caution = LEAST_CAUTION
            return None
        if cost is None or self._all.tokens.value is None:
            return None
        decode_s = self._decode_s(cost, others)
        # Beside prompts everybody who decodes has a token in each step.
        prompt_token_s = cost.prompt_token_s + decode_s / self._max_num_batched_tokens
        token_s = self._token_s(place.line, now_s, others)
        outputs = self._outputs(place.line.tenant, stopping)
        wait_s = max(self._row_wait_s(place.line, token_s, others), self._tokens_ahead(place) * prompt_token_s)
        first_s = wait_s + num_prompt * prompt_token_s + decode_s
        last_s = first_s + max(0.0, outputs - 1.0) * token_s
        return Estimate(self._caution * first_s, self._caution * last_s, self._caution)

    def turn_s(self, line: TenantBacklog, now_s: float) -> float:
        """Between two of a tenant that are let in: as many as lately, of which its weight says how many are its own."""
        per_s = self._lately(now_s) / RATE_S * line.weight / self._weights(line)
        if per_s < 1.0 / RATE_S:  # hardly any were
            return self._row_s(line, self._token_s(line, now_s)) / max(1.0, self._rows(line))
        return 1.0 / per_s

    def _decode_s(self, cost: StepCost, others: float) -> float:
        """Of a step without prompts, once all that are under way decode."""
        return cost.step_s + min(self._backlog.requests + others, self._max_num_seqs) * cost.row_s

    def _lately(self, now_s: float) -> float:
        return self._recent_requests * math.exp((self._counted_at_s - now_s) / RATE_S)

    def _recent(self, now_s: float) -> float:
        return self._recent_tokens * math.exp((self._counted_at_s - now_s) / RECENT_S)

    def _token_s(self, line: TenantBacklog, now_s: float, others: float = 0.0) -> float:
        """Between two tokens of an answer, while prompts are taken on as lately."""
        cost = self._steps.cost()
        if cost is None:
            return 0.0
        decode_s = self._decode_s(cost, others)
        for_prompts = min(self._recent(now_s) / RECENT_S * cost.prompt_token_s, MOST_FOR_PROMPTS)
        of_others = self._backlog.requests - line.requests
        share = SHARE_BESIDE_OTHERS if of_others >= CROWD * line.requests else 1.0
        longest_s = decode_s + share * self._max_num_batched_tokens * cost.prompt_token_s
        return min(decode_s / (1.0 - for_prompts), longest_s)

    def _row_s(self, line: TenantBacklog, token_s: float) -> float:
        """Between a request's first token and its last."""
        return (self._lengths(line.tenant).tokens.value or self._all.tokens.value or 1.0) * token_s

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
        return max(self._max_num_seqs * line.weight / self._weights(line), float(self._max_num_seqs - others))

    def _weights(self, line: TenantBacklog) -> float:
        """Of all tenants that have requests, and of this one."""
        return self._backlog.weight + (0.0 if line.requests else line.weight)

    def _row_wait_s(self, line: TenantBacklog, token_s: float, others: float) -> float:
        rows = self._rows(line)
        return max(0.0, line.requests + others - rows) * self._row_s(line, token_s) / rows

    def _tokens_ahead(self, place: Place) -> int:
        """Of prompts: its tenant's, and as many of others, which come in turn with them."""
        own = place.line.waiting_tokens - place.tokens
        return min(2 * own, self._backlog.waiting_tokens - place.tokens)
