"""A histogram with fixed buckets: one writer, any number of readers, no lock. A leaf file: imports nothing of ours."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Upper bounds, in seconds, counts or ratios as their names say.
REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 600.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
PHASE_S = (1e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
RATIO = (0.1, 0.25, 0.5, 0.67, 0.8, 1.0, 1.25, 1.5, 2.0, 4.0, 10.0)
COUNTS = tuple(float(2**power) for power in range(14))  # 1 to 8192


class Owner(NamedTuple):
    """The request that a value is of, by which it is found again."""

    request_id: str
    trace_id: str = ""  # in hexadecimal; "": no trace has it


class Exemplar(NamedTuple):
    """One of a bucket's values: whose it was, and when, in seconds since the epoch."""

    whose: Owner
    value: float
    at_s: float


@dataclass(frozen=True, slots=True)
class HistogramCounts:
    """What a histogram held at one moment. `counts[i]` values were at most `bounds[i]`, the last count's were above."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float
    exemplars: tuple[Exemplar | None, ...] = ()  # of each bucket, where values have an owner: the last one's

    @property
    def count(self) -> int:
        return sum(self.counts)

    def since(self, earlier: HistogramCounts) -> HistogramCounts:
        """What came between the two."""
        counts = tuple(now - then for now, then in zip(self.counts, earlier.counts, strict=True))
        return HistogramCounts(self.bounds, counts, self.sum - earlier.sum)

    def quantile(self, share: float) -> float | None:
        """As Prometheus reckons it: values lie evenly in their bucket, and none above the last bound. None: there are
        none."""
        if not self.count:
            return None
        wanted, below = share * self.count, 0.0
        for count, low, high in zip(self.counts, (0.0, *self.bounds), self.bounds, strict=False):
            if count and below + count >= wanted:
                return low + (high - low) * (wanted - below) / count
            below += count
        return self.bounds[-1]


class Histogram:
    """Only one thread at a time may call `observe`; `read` may be called from any."""

    __slots__ = ("_bounds", "_counts", "_exemplars", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._exemplars: dict[int, Exemplar] = {}  # by bucket
        self._sum = 0.0

    def observe(self, value: float, times: int = 1, *, whose: Owner | None = None) -> None:
        """Count one value, `times` times."""
        bucket = bisect_left(self._bounds, value)
        self._counts[bucket] += times
        self._sum += value * times
        if whose is not None:
            self._exemplars[bucket] = Exemplar(whose, value, time.time())

    def read(self) -> HistogramCounts:
        """The buckets are copied at once; the sum may be of a value later or earlier."""
        found = self._exemplars.copy()
        exemplars = tuple(map(found.get, range(len(self._counts)))) if found else ()
        return HistogramCounts(self._bounds, tuple(self._counts), self._sum, exemplars)
