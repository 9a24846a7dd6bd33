"""When each token came, and what follows from it: one record for every contender, and the loop that takes turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.workload import Request


@dataclass(frozen=True, slots=True)
class Answer:
    """`times_s[i]`: when token i came, counted from when the run's requests arrived together."""

    request: Request
    tokens: tuple[int, ...]
    times_s: tuple[float, ...]
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """All requests of one arrival."""

    answers: tuple[Answer, ...]

    @property
    def requests(self) -> tuple[Request, ...]:
        return tuple(answer.request for answer in self.answers)

    @property
    def total_s(self) -> float:
        return max(answer.times_s[-1] for answer in self.answers)

    @property
    def ttft_s(self) -> list[float]:
        """Time to first token of each request."""
        return [answer.times_s[0] for answer in self.answers]

    @property
    def decode_step_s(self) -> float | None:
        """Seconds for one more token of every request, while all of them decode.

        From the last request's first token to the first request's last one; None if no token comes between the two.
        """
        start_s = max(self.ttft_s)
        end_s = min(answer.times_s[-1] for answer in self.answers)
        tokens = sum(start_s < time_s <= end_s for answer in self.answers for time_s in answer.times_s)
        return (end_s - start_s) * len(self.answers) / tokens if tokens else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """`run(i)` serves round i's requests: one run, or one per request where they are served one after another."""

    name: str
    run: Callable[[int], Sequence[Run]]
    merged: bool = False  # its adapters are part of the weights, and cost nothing more
    one_by_one: bool = False
    theirs: bool = False  # if its tokens are wrong it is left out, where we would stop
    note: str = ""


Rounds = dict[str, list[Sequence[Run]]]  # by contender; item i is round i's


def interleave(contenders: Sequence[Contender], rounds: int, *, check: Callable[[Run], None]) -> Rounds:
    """Warm up, check every token, and only then measure. Contenders take turns, and each round is checked again."""
    for contender in contenders:
        for run in contender.run(0):
            check(run)
    measured: Rounds = {contender.name: [] for contender in contenders}
    for index in range(1, rounds + 1):
        for contender in contenders:
            runs = contender.run(index)
            for run in runs:
                check(run)
            measured[contender.name].append(runs)
    return measured


def by_turns_s(works: Mapping[str, Callable[[], None]], samples: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other and again, so that sample i of all is of one moment; a pass warms up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(samples + 1):
        for name, work in works.items():
            started_s = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started_s)
    return {name: own[1:] for name, own in times.items()}


class SameTokens:
    """The first run's tokens are what every other run must give."""

    def __init__(self, culprit: str) -> None:
        """`culprit`: what changed them, if they differ."""
        self._culprit = culprit
        self._expected: list[tuple[int, ...]] | None = None

    def check(self, run: Run) -> None:
        tokens = [answer.tokens for answer in run.answers]
        self._expected = self._expected or tokens
        if tokens != self._expected:
            raise RuntimeError(f"{self._culprit} changed the tokens")


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Of what was measured by turns: each with the one that followed it."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def mean_total_s(runs: Sequence[Run]) -> float:
    """Of a round."""
    return statistics.fmean(run.total_s for run in runs)


def mean_decode_step_s(runs: Sequence[Run]) -> float | None:
    """Of a round; None where a run has no steps to measure."""
    steps = [step for run in runs if (step := run.decode_step_s) is not None]
    return statistics.fmean(steps) if len(steps) == len(runs) else None
