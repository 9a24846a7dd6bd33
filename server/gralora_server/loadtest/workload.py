"""What customers do, as distributions: when they come, for which adapter, with how much. Drawn once, into a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from gralora_runtime.errors import ConfigError
from gralora_server.loadtest.trace import Trace, TraceRequest

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]
Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
Parsed = TypeVar("Parsed")


class Arrivals(Protocol):
    """When requests come."""

    def times_s(self, random: np.random.Generator, duration_s: float) -> Floats:
        """Ascending, from 0 to below `duration_s`."""


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


@dataclass(frozen=True, slots=True)
class Bursts:
    """Open loop. `size` requests at once, at equal intervals."""

    rate_per_s: float  # of requests, not of bursts
    size: int

    def times_s(self, random: np.random.Generator, duration_s: float) -> Floats:  # noqa: ARG002
        return np.repeat(np.arange(0, duration_s, self.size / self.rate_per_s), self.size)


@dataclass(frozen=True, slots=True)
class Closed:
    """Closed loop: so many clients, each sending its next request when the last one is answered."""

    concurrency: int
    # Drawn in advance, so that the trace is the same for every server. One that answers more begins anew.
    most_per_s: float = 200.0

    def times_s(self, random: np.random.Generator, duration_s: float) -> Floats:  # noqa: ARG002
        return np.zeros(self.concurrency + int(duration_s * self.most_per_s))


@dataclass(frozen=True, slots=True)
class Popularity:
    """How likely each of N adapters is asked for; the first one most."""

    kind: str = "uniform"
    alpha: float = 1.0  # zipf: the i-th is asked for in proportion to i ** -alpha
    hot: int = 1  # hot-set: so many adapters
    share: float = 1.0  # ... get this share of the requests

    def weights(self, count: int) -> Floats:
        if self.kind == "zipf":
            weights = np.arange(1, count + 1, dtype=np.float64) ** -self.alpha
        elif self.kind == "hot-set" and self.hot < count:
            weights = np.full(count, (1 - self.share) / (count - self.hot))
            weights[: self.hot] = self.share / self.hot
        elif self.kind == "identical":
            weights = np.eye(1, count)[0]
        else:
            weights = np.ones(count)
        return np.asarray(weights / weights.sum(), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens: uniform from `low` to `high`; with a `sigma` log-normal around the median `low`, at most `high`."""

    low: int
    high: int
    sigma: float | None = None

    def draw(self, random: np.random.Generator, count: int) -> Ints:
        if self.sigma is None:
            return random.integers(self.low, self.high, count, endpoint=True)
        drawn = np.exp(random.normal(math.log(self.low), self.sigma, count))
        return np.clip(np.rint(drawn), 1, self.high).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The same seed gives the same trace."""

    arrivals: Arrivals
    adapters: Sequence[str]  # none: the base model
    popularity: Popularity
    prompt: Lengths
    output: Lengths
    duration_s: float
    warmup_s: float
    seed: int

    def trace(self) -> Trace:
        """Raises ConfigError if nothing would be sent after the warm-up."""
        # Streams of their own, so that a change of one distribution leaves what the others draw as it was.
        when, who, prompt, output, seeds = map(np.random.default_rng, np.random.SeedSequence(self.seed).spawn(5))
        times = self.arrivals.times_s(when, self.duration_s)
        closed = isinstance(self.arrivals, Closed)
        if self.warmup_s >= self.duration_s or (not closed and not (times >= self.warmup_s).any()):
            raise ConfigError(
                f"no request would be counted: the warm-up takes {self.warmup_s:g} s of {self.duration_s:g} s"
            )
        names = self.adapters or ("",)
        chosen = who.choice(len(names), len(times), p=self.popularity.weights(len(names)))
        requests = tuple(
            TraceRequest(arrival_s=float(at), adapter=names[i], prompt_tokens=p, output_tokens=o, seed=seed)
            for at, i, p, o, seed in zip(
                times,
                chosen.tolist(),
                self.prompt.draw(prompt, len(times)).tolist(),
                self.output.draw(output, len(times)).tolist(),
                seeds.integers(0, 2**31, len(times)).tolist(),
                strict=True,
            )
        )
        concurrency = self.arrivals.concurrency if isinstance(self.arrivals, Closed) else None
        return Trace(requests=requests, warmup_s=self.warmup_s, duration_s=self.duration_s, concurrency=concurrency)


def parse_arrivals(text: str) -> Arrivals:
    """poisson:RATE, gamma:RATE,CV, constant:RATE, burst:RATE,SIZE or closed:CLIENTS. Rates are requests a second."""
    makers: dict[str, Callable[..., Arrivals]] = {
        "poisson": lambda rate: Renewal(_positive(rate)),
        "gamma": lambda rate, cv: Renewal(_positive(rate), _positive(cv)),
        "constant": lambda rate: Renewal(_positive(rate), cv=0.0),
        "burst": lambda rate, size: Bursts(_positive(rate), _count(size)),
        "closed": lambda clients: Closed(_count(clients)),
    }
    return _parse("arrivals", text, makers, "poisson:4, gamma:4,2.5, constant:4, burst:4,8, closed:16")


def parse_popularity(text: str) -> Popularity:
    """uniform, zipf:ALPHA, hot-set:COUNT,SHARE or identical."""
    makers: dict[str, Callable[..., Popularity]] = {
        "uniform": lambda: Popularity("uniform"),
        "zipf": lambda alpha: Popularity("zipf", alpha=_positive(alpha)),
        "hot-set": lambda hot, share: Popularity("hot-set", hot=_count(hot), share=_share(share)),
        "identical": lambda: Popularity("identical"),
    }
    return _parse("popularity", text, makers, "uniform, zipf:1.0, hot-set:10,0.9, identical")


def parse_lengths(text: str) -> Lengths:
    """N, LOW-HIGH, or lognormal:MEDIAN,SIGMA,MAX. In tokens."""
    examples = "64, 16-128, lognormal:64,0.5,512"
    low, dash, high = text.partition("-")
    if not dash and text.isdigit() and int(text) > 0:
        return Lengths(int(text), int(text))
    if dash and low.isdigit() and high.isdigit() and 0 < int(low) <= int(high):
        return Lengths(int(low), int(high))
    makers: dict[str, Callable[..., Lengths]] = {
        "lognormal": lambda median, sigma, most: Lengths(_count(median), _count(most), _positive(sigma))
    }
    return _parse("length", text, makers, examples)


def _parse(what: str, text: str, makers: dict[str, Callable[..., Parsed]], examples: str) -> Parsed:
    kind, _, rest = text.partition(":")
    try:
        return makers[kind](*(rest.split(",") if rest else ()))
    except (KeyError, TypeError, ValueError) as cause:
        raise ConfigError(f"{what} {text!r} is not understood (examples: {examples})") from cause


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value
