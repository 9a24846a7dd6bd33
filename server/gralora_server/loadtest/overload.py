"""Records of a run to what each tenant got: in time or late, refused, and how right it was told when to come again."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gralora_runtime.scheduling.fairness import Prices
from gralora_server.loadtest.patience import Patience
from gralora_server.loadtest.record import RequestRecord
from gralora_server.loadtest.recovery import Recovery, recovery
from gralora_server.loadtest.summary import Distribution, Frozen, Slo, Window, jain, percentile

DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
TOP_TENANTS = 50
MAX_BINS = 300
PRICES = Prices()


class Retries(Frozen):
    """Of requests that were refused and came again when they were told to. A wait is from the first refusal to the try
    that was let in, as a multiple of the time that the first refusal told: 1 where that was right."""

    came_again: int
    let_in: int
    at_first_retry: int  # of those that were let in
    wait_p25: float
    wait_p50: float
    wait_p75: float


class TenantSummary(Frozen):
    """Counts are of the requests that were due in the window, whose ends add up to `requests`. In time: within the
    objective, and within the deadline if there is one, both from when the request was due. Rates are of what happened
    in the window."""

    weight: float
    requests: int
    in_time: int
    late: int  # answered all the same
    refused: Mapping[str, int]  # by the reason that was last said
    deadline_exceeded: int
    errors: Mapping[str, int]  # all others, by status
    in_time_once_let_in: int  # by the same objective, from when the try was sent that was let in
    good_requests_per_s: float  # in time
    good_tokens_per_s: float
    served: float  # prompts' and answers' tokens at the scheduler's default prices
    served_per_s: float
    ttft_s: Distribution
    tries: int
    refusals: Mapping[str, int]  # of all tries, by reason
    refusal_s: Distribution  # from sending to being refused
    told_s: Distribution  # when to come again
    first_refusal_s: float | None  # from the start of the run
    retries: Retries


class Bin(Frozen):
    """A stretch of a run."""

    at_s: float  # its beginning
    good: int  # requests that ended in time
    refusals: int  # tries
    ttft_p99_s: float | None  # of the requests that were due; None if none had a token
    served: Mapping[str, float]  # by tenant, as in `TenantSummary`


class Overload(Frozen):
    """What became of a load that may be more than a server can serve."""

    deadline_s: float | None
    retries: int
    patience_s: float | None
    total: TenantSummary
    tenants: Mapping[str, TenantSummary]  # those that were served most; empty: no tenants were told apart
    jain: float | None  # over all tenants, of what they were served by their weights
    bin_s: float
    bins: tuple[Bin, ...]
    recovery: Recovery | None  # None: the arrivals did not rise and fall


@dataclass(frozen=True, slots=True)
class Objective:
    """What is in time."""

    slo: Slo
    deadline_s: float | None

    def met_by(self, record: RequestRecord) -> bool:
        return self._met(record, 0.0)

    def met_once_let_in(self, record: RequestRecord) -> bool:
        """As if the request had been due when its last try was sent."""
        return self._met(record, record.tries[-1].sent_s - record.sent_s) if record.tries else self.met_by(record)

    def _met(self, record: RequestRecord, excused_s: float) -> bool:
        itl_s, ttft_s = record.mean_itl_s, record.ttft_s
        if not record.ok or ttft_s is None or ttft_s - excused_s > self.slo.ttft_s:
            return False
        in_time = self.deadline_s is None or record.e2e_s - excused_s <= self.deadline_s
        return in_time and (itl_s is None or itl_s <= self.slo.itl_s)


def overload(
    records: Sequence[RequestRecord],
    *,
    window: Window,
    slo: Slo,
    patience: Patience,
    weights: Mapping[str, float],
    peak: tuple[float, float] | None,
) -> Overload:
    """`weights` of tenants, 1 for who has none there; `peak`: from when to when more came than before and after."""
    objective = Objective(slo, patience.deadline_s)
    by_tenant: dict[str, list[RequestRecord]] = {}
    for record in records:
        by_tenant.setdefault(record.tenant, []).append(record)
    tenants = {name: _tenant(own, window, objective, weights.get(name, 1.0)) for name, own in by_tenant.items() if name}
    most = sorted(tenants, key=lambda name: (-tenants[name].served, name))[:TOP_TENANTS]
    bin_s = max(1.0, window.end_s / MAX_BINS)
    return Overload(
        deadline_s=patience.deadline_s,
        retries=patience.retries,
        patience_s=patience.total_s,
        total=_tenant(records, window, objective, 1.0),
        tenants={name: tenants[name] for name in most},
        jain=jain([one.served / one.weight for one in tenants.values()]) if tenants else None,
        bin_s=bin_s,
        bins=_bins(records, window, objective, bin_s, most),
        recovery=None if peak is None else recovery(records, window, *peak),
    )


def served_at(record: RequestRecord) -> list[tuple[float, float]]:
    """When it was served how much: its prompt with its first token, and each token."""
    times = record.token_times_s
    prompt = [(times[0], PRICES.prompt_token * record.prompt_tokens)] if times else []
    return prompt + [(at_s, PRICES.output_token) for at_s in times]


def _tenant(records: Sequence[RequestRecord], window: Window, objective: Objective, weight: float) -> TenantSummary:
    counted = [record for record in records if record.counted]
    refusals = [one for record in counted for one in record.refusals]
    good = [record for record in records if window.holds(record.finished_s) and objective.met_by(record)]
    served = sum(amount for record in records for at_s, amount in served_at(record) if window.holds(at_s))
    in_time = sum(map(objective.met_by, counted))
    failed = [record for record in counted if not record.ok and not record.refused]
    return TenantSummary(
        weight=weight,
        requests=len(counted),
        in_time=in_time,
        late=sum(record.ok for record in counted) - in_time,
        refused=dict(Counter(record.tries[-1].reason for record in counted if record.refused)),
        deadline_exceeded=sum(record.status == DEADLINE_EXCEEDED for record in failed),
        errors=dict(Counter(record.status for record in failed if record.status != DEADLINE_EXCEEDED)),
        in_time_once_let_in=sum(map(objective.met_once_let_in, counted)),
        good_requests_per_s=window.rate(len(good)),
        good_tokens_per_s=window.rate(sum(record.num_tokens for record in good)),
        served=served,
        served_per_s=window.rate(served),
        ttft_s=Distribution.of(record.ttft_s for record in counted if record.ttft_s is not None),
        tries=sum(len(record.tries) for record in counted),
        refusals=dict(Counter(one.reason for one in refusals)),
        refusal_s=Distribution.of(one.ended_s - one.sent_s for one in refusals),
        told_s=Distribution.of(one.retry_s for one in refusals if one.retry_s is not None),
        first_refusal_s=min((one.ended_s for record in records for one in record.refusals), default=None),
        retries=_retries(counted),
    )


def _retries(records: Iterable[RequestRecord]) -> Retries:
    again = [record for record in records if record.refusals and len(record.tries) > 1]
    let_in = [record for record in again if not record.refused]
    waits = sorted(_wait(record) for record in let_in)
    p25, p50, p75 = (percentile(waits, p) for p in (25, 50, 75))
    return Retries(
        came_again=len(again),
        let_in=len(let_in),
        at_first_retry=sum(len(record.tries) == 2 for record in let_in),
        wait_p25=p25,
        wait_p50=p50,
        wait_p75=p75,
    )


def _wait(record: RequestRecord) -> float:
    first = record.tries[0]
    assert first.retry_s is not None
    # The shortest time that can be told is a millisecond.
    return (record.tries[-1].sent_s - first.ended_s) / max(first.retry_s, 0.001)


def _bins(
    records: Sequence[RequestRecord], window: Window, objective: Objective, bin_s: float, tenants: Sequence[str]
) -> tuple[Bin, ...]:
    """From the start of the run, warm-up and all, to its end."""
    good, refusals, served = Counter[int](), Counter[int](), defaultdict[tuple[int, str], float](float)
    delays: dict[int, list[float]] = {}
    for record in records:
        good[int(record.finished_s / bin_s)] += objective.met_by(record)
        refusals.update(int(one.ended_s / bin_s) for one in record.refusals)
        if record.ttft_s is not None:
            delays.setdefault(int(record.intended_s / bin_s), []).append(record.ttft_s)
        for at_s, amount in served_at(record):
            served[int(at_s / bin_s), record.tenant] += amount
    return tuple(
        Bin(
            at_s=i * bin_s,
            good=good[i],
            refusals=refusals[i],
            ttft_p99_s=percentile(sorted(delays[i]), 99) if i in delays else None,
            served={name: served[i, name] for name in tenants},
        )
        for i in range(math.ceil(window.end_s / bin_s))
    )
