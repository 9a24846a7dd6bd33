"""Records of a run to its figures."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from pydantic import BaseModel, ConfigDict

from gralora_server.loadtest.record import RequestRecord

PERCENTILES = (50, 90, 95, 99)
# A request that was sent so much later than it should have been was held up in the generator.
LATE_S = 0.05
BUSY_SHARE = 0.9


class Frozen(BaseModel):
    """A value that can be written as JSON and read again; what is unknown or missing is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Slo(Frozen):
    """What counts as good service: both, for a request. ITL: the mean time between the tokens of a request."""

    ttft_s: float = 2.0
    itl_s: float = 0.2

    def met_by(self, record: RequestRecord) -> bool:
        ttft_s, itl_s = record.ttft_s, record.mean_itl_s
        return record.ok and ttft_s is not None and ttft_s <= self.ttft_s and (itl_s is None or itl_s <= self.itl_s)


class Distribution(Frozen):
    """Of delays, in seconds. All zero if there were none."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution:
        ordered = sorted(values)
        points = {f"p{p}": percentile(ordered, p) for p in PERCENTILES}
        largest = ordered[-1] if ordered else 0.0
        return cls(count=len(ordered), mean=fmean(ordered) if ordered else 0.0, max=largest, **points)


class Service(Frozen):
    """What one adapter's customers got."""

    requests: int
    ok: int
    tokens: int
    ttft_s: float  # mean


class Fairness(Frozen):
    """Over adapters with at least one request. Service is the rate of a request, its tokens over its time, averaged
    over an adapter's requests, failed ones as 0: the busier adapter is not the better served one."""

    adapters: int
    jain: float  # 1: all alike; 1/n: one has it all (Jain, Chiu and Hawe 1984)
    max_over_min: float | None  # None: somebody got nothing


class Generator(Frozen):
    """Whether the load was what it should have been."""

    send_lag_p99_s: float  # requests were sent so much later than they were due
    wake_lag_p99_s: float  # its loop woke up so much later than it asked to
    cpu_share: float  # of one core
    limited: bool  # the generator, not the server, was the bottleneck: do not believe the figures


class Summary(Frozen):
    """Counts and delays are of the requests that were due in the window from warm-up to end, however long they took.
    Rates are of what happened in the window: tokens that came, requests that ended well."""

    label: str
    duration_s: float  # of the window
    requests: int
    ok: int
    errors: Mapping[str, int]  # by status
    tokens: int
    tokens_per_s: float
    requests_per_s: float
    ttft_s: Distribution
    itl_s: Distribution  # every gap between two tokens of a request
    e2e_s: Distribution
    queue_s: Distribution
    slo: Slo
    goodput_per_s: float  # requests that met the SLO
    goodput_share: float
    fairness: Fairness
    adapters: Mapping[str, Service]  # the busiest ones
    generator: Generator


TOP_ADAPTERS = 100


@dataclass(frozen=True, slots=True)
class Window:
    """What is measured, in seconds from the start of the run."""

    start_s: float
    end_s: float

    def holds(self, at_s: float) -> bool:
        return self.start_s <= at_s < self.end_s

    def rate(self, count: float) -> float:
        return count / (self.end_s - self.start_s)


def summarise(
    label: str, records: Sequence[RequestRecord], *, window: Window, slo: Slo, generator: Generator
) -> Summary:
    """The figures of one run."""
    counted = [record for record in records if record.counted]
    good = [record for record in counted if record.ok]
    ended = [record for record in records if record.ok and window.holds(record.finished_s)]
    arrived = sum(window.holds(at_s) for record in records for at_s in record.token_times_s)
    return Summary(
        label=label,
        duration_s=window.end_s - window.start_s,
        requests=len(counted),
        ok=len(good),
        errors=dict(Counter(record.status for record in counted if not record.ok)),
        tokens=arrived,
        tokens_per_s=window.rate(arrived),
        requests_per_s=window.rate(len(ended)),
        ttft_s=Distribution.of(record.ttft_s for record in good if record.ttft_s is not None),
        itl_s=Distribution.of(gap for record in good for gap in gaps_s(record)),
        e2e_s=Distribution.of(record.e2e_s for record in good),
        queue_s=Distribution.of(record.queue_s for record in good),
        slo=slo,
        goodput_per_s=window.rate(sum(map(slo.met_by, ended))),
        goodput_share=sum(map(slo.met_by, counted)) / len(counted) if counted else 0.0,
        fairness=fairness(counted),
        adapters=_services(counted),
        generator=generator,
    )


def generator_health(records: Sequence[RequestRecord], wake_lags_s: Sequence[float], cpu_share: float) -> Generator:
    """Delays below `LATE_S` do not matter to figures of tens of milliseconds and more."""
    send_lag_s = percentile(sorted(record.send_lag_s for record in records if record.counted), 99)
    wake_lag_s = percentile(sorted(wake_lags_s), 99)
    limited = max(send_lag_s, wake_lag_s) > LATE_S or cpu_share > BUSY_SHARE
    return Generator(send_lag_p99_s=send_lag_s, wake_lag_p99_s=wake_lag_s, cpu_share=cpu_share, limited=limited)


def percentile(ordered: Sequence[float], p: float) -> float:
    """The smallest value that at least p % of all are not above (nearest rank); 0 of nothing."""
    return ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] if ordered else 0.0


def gaps_s(record: RequestRecord) -> list[float]:
    """Time from each token to the next."""
    times = record.token_times_s
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def fairness(records: Sequence[RequestRecord]) -> Fairness:
    by_adapter = {name: fmean(map(_service_rate, own)) for name, own in _by_adapter(records).items()}
    rates = list(by_adapter.values())
    ratio = max(rates) / min(rates) if rates and min(rates) > 0 else None
    return Fairness(adapters=len(rates), jain=jain(rates), max_over_min=ratio)


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 if all are alike, 1/n if one has it all; 0 if nobody has anything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 0.0


def _service_rate(record: RequestRecord) -> float:
    return record.num_tokens / record.e2e_s if record.ok and record.e2e_s > 0 else 0.0


def _by_adapter(records: Sequence[RequestRecord]) -> dict[str, list[RequestRecord]]:
    found: dict[str, list[RequestRecord]] = {}
    for record in records:
        found.setdefault(record.adapter, []).append(record)
    return found


def _services(records: Sequence[RequestRecord]) -> dict[str, Service]:
    busiest = sorted(_by_adapter(records).items(), key=lambda item: (-len(item[1]), item[0]))[:TOP_ADAPTERS]
    return {name: _service(own) for name, own in busiest}


def _service(records: Sequence[RequestRecord]) -> Service:
    delays = [record.ttft_s for record in records if record.ttft_s is not None]
    return Service(
        requests=len(records),
        ok=sum(record.ok for record in records),
        tokens=sum(record.num_tokens for record in records),
        ttft_s=fmean(delays) if delays else 0.0,
    )
