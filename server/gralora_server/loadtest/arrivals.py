"""When requests come: processes, and what a command line calls them."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from gralora_runtime.errors import ConfigError
from gralora_server.loadtest.parsing import parse, positive, whole

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


class Arrivals(Protocol):
    """When requests come."""

    def times_s(self, random: np.random.Generator, duration_s: float) -> Floats:
        """Ascending, from 0 to below `duration_s`."""

    def scaled(self, share: float) -> Arrivals:
        """The same, of this share of the requests."""


@dataclass(frozen=True, slots=True)
class Renewal:
    """Open loop. Gaps are gamma-distributed: cv 1 is a Poisson process, 0 a metronome, more than 1 comes in clumps."""

    rate_per_s: float
    cv: float = 1.0

    def times_s(self, random: np.random.Generator, duration_s: float) -> Floats:
        count = int(self.rate_per_s * duration_s + 8 * (1 + self.cv) * math.sqrt(self.rate_per_s * duration_s) + 8)
        if self.cv == 0:
            gaps = np.full(count, 1 / self.rate_per_s)
        else:
            shape = self.cv**-2
            gaps = random.gamma(shape, 1 / (self.rate_per_s * shape), count)
        times = np.cumsum(gaps)
        return times[times < duration_s]

    def scaled(self, share: float) -> Renewal:
        return replace(self, rate_per_s=share * self.rate_per_s)


@dataclass(frozen=True, slots=True)
class Steps:
    """Open loop. A Poisson process whose rate changes; the last rate goes on to the end."""

    steps: tuple[tuple[float, float], ...]  # requests a second, and for how many seconds

    def times_s(self, random: np.random.Generator, duration_s: float) -> Floats:
        rates, seconds = zip(*self.steps, strict=True)
        ends = np.cumsum(np.array(seconds, dtype=np.float64))
        ends[-1] = max(ends[-1], duration_s)
        starts = np.concatenate(([0.0], ends[:-1]))
        expected = np.concatenate(([0.0], np.cumsum(np.array(rates) * (ends - starts))))  # requests until then
        most = expected[-1]
        units = np.cumsum(random.exponential(1.0, int(most + 8 * math.sqrt(most) + 8)))
        times: Floats = np.interp(units[units < most], expected, np.concatenate(([0.0], ends)))
        return times[times < duration_s]

    def scaled(self, share: float) -> Steps:
        return Steps(tuple((share * rate, seconds) for rate, seconds in self.steps))


@dataclass(frozen=True, slots=True)
class Bursts:
    """Open loop. `size` requests at once, at equal intervals."""

    rate_per_s: float  # of requests, not of bursts
    size: int

    def times_s(self, random: np.random.Generator, duration_s: float) -> Floats:  # noqa: ARG002
        return np.repeat(np.arange(0, duration_s, self.size / self.rate_per_s), self.size)

    def scaled(self, share: float) -> Bursts:
        return replace(self, rate_per_s=share * self.rate_per_s)


@dataclass(frozen=True, slots=True)
class Closed:
    """Closed loop: so many clients, each sending its next request when the last one is answered."""

    concurrency: int
    # Drawn in advance, so that the trace is the same for every server. One that answers more begins anew.
    most_per_s: float = 200.0

    def times_s(self, random: np.random.Generator, duration_s: float) -> Floats:  # noqa: ARG002
        return np.zeros(self.concurrency + int(duration_s * self.most_per_s))

    def scaled(self, share: float) -> Closed:  # noqa: ARG002
        raise ConfigError("a closed loop has no rate of which tenants could have shares: give an open loop's arrivals")


def peak(arrivals: Sequence[Arrivals], duration_s: float) -> tuple[float, float] | None:
    """From when to when most comes, of those whose rate changes; None if less comes neither before nor after."""
    steps = [one.steps for one in arrivals if isinstance(one, Steps)]
    marks = sorted({0.0, duration_s, *(at for one in steps for at in _ends(one) if at < duration_s)})
    rates = [sum(_rate(one, at) for one in steps) for at in marks[:-1]]
    if not rates or max(rates) in (rates[0], rates[-1]):
        return None
    first = rates.index(max(rates))
    last = next(i for i in range(first, len(rates)) if rates[i] < rates[first])
    return marks[first], marks[last]


def _ends(steps: Sequence[tuple[float, float]]) -> list[float]:
    return list(itertools.accumulate(seconds for _, seconds in steps[:-1]))


def _rate(steps: Sequence[tuple[float, float]], at_s: float) -> float:
    return steps[bisect_right(_ends(steps), at_s)][0]


def parse_arrivals(text: str) -> Arrivals:
    """poisson:RATE, gamma:RATE,CV, constant:RATE, burst:RATE,SIZE, step:RATE,SECONDS,... or closed:CLIENTS.

    Rates are requests a second.
    """
    makers: dict[str, Callable[..., Arrivals]] = {
        "poisson": lambda rate: Renewal(positive(rate)),
        "gamma": lambda rate, cv: Renewal(positive(rate), positive(cv)),
        "constant": lambda rate: Renewal(positive(rate), cv=0.0),
        "burst": lambda rate, size: Bursts(positive(rate), whole(size)),
        "step": _steps,
        "closed": lambda clients: Closed(whole(clients)),
    }
    examples = "poisson:4, gamma:4,2.5, constant:4, burst:4,8, step:1,20,10,20,1,20, closed:16"
    return parse("arrivals", text, makers, examples)


def _steps(*parts: str) -> Steps:
    rates = [float(part) for part in parts[::2]]
    seconds = [positive(part) for part in parts[1::2]]
    if not all(0 <= rate < math.inf for rate in rates) or not any(rates):
        raise ValueError(rates)
    return Steps(tuple(zip(rates, seconds, strict=True)))
