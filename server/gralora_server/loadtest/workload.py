"""What customers do, as distributions: when they come, for which adapter, with how much. Drawn once, into a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gralora_runtime.errors import ConfigError
from gralora_server.loadtest.arrivals import Arrivals, Closed, Floats, peak
from gralora_server.loadtest.parsing import parse, positive, share, whole
from gralora_server.loadtest.trace import Trace, TraceRequest

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]


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
        concurrency = self.arrivals.concurrency if isinstance(self.arrivals, Closed) else None
        return checked(
            Trace(
                requests=self.requests(),
                warmup_s=self.warmup_s,
                duration_s=self.duration_s,
                concurrency=concurrency,
                peak=peak([self.arrivals], self.duration_s),
            )
        )

    def requests(self) -> tuple[TraceRequest, ...]:
        """In the order of their arrival."""
        # Streams of their own, so that a change of one distribution leaves what the others draw as it was.
        when, who, prompt, output, seeds = map(np.random.default_rng, np.random.SeedSequence(self.seed).spawn(5))
        times = self.arrivals.times_s(when, self.duration_s)
        names = self.adapters or ("",)
        chosen = who.choice(len(names), len(times), p=self.popularity.weights(len(names)))
        return tuple(
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


def checked(trace: Trace) -> Trace:
    """Raises ConfigError if nothing would be sent after the warm-up."""
    late = trace.concurrency is not None or any(one.arrival_s >= trace.warmup_s for one in trace.requests)
    if trace.warmup_s >= trace.duration_s or not late:
        raise ConfigError(
            f"no request would be counted: the warm-up takes {trace.warmup_s:g} s of {trace.duration_s:g} s"
        )
    return trace


def parse_popularity(text: str) -> Popularity:
    """uniform, zipf:ALPHA, hot-set:COUNT,SHARE or identical."""
    makers: dict[str, Callable[..., Popularity]] = {
        "uniform": lambda: Popularity("uniform"),
        "zipf": lambda alpha: Popularity("zipf", alpha=positive(alpha)),
        "hot-set": lambda hot, part: Popularity("hot-set", hot=whole(hot), share=share(part)),
        "identical": lambda: Popularity("identical"),
    }
    return parse("popularity", text, makers, "uniform, zipf:1.0, hot-set:10,0.9, identical")


def parse_lengths(text: str) -> Lengths:
    """N, LOW-HIGH, or lognormal:MEDIAN,SIGMA,MAX. In tokens."""
    examples = "64, 16-128, lognormal:64,0.5,512"
    low, dash, high = text.partition("-")
    if not dash and text.isdigit() and int(text) > 0:
        return Lengths(int(text), int(text))
    if dash and low.isdigit() and high.isdigit() and 0 < int(low) <= int(high):
        return Lengths(int(low), int(high))
    makers: dict[str, Callable[..., Lengths]] = {
        "lognormal": lambda median, sigma, most: Lengths(whole(median), whole(most), positive(sigma))
    }
    return parse("length", text, makers, examples)
