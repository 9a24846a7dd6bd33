"""What the engine's thread writes down about its steps. Plain counts: the thread never waits for whoever reads them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ParamSpec, TypeVar

from gralora_runtime.observation.histogram import COUNTS, PHASE_S, Histogram, HistogramCounts
from gralora_runtime.plan import StepPlan

P = ParamSpec("P")
T = TypeVar("T")


class Phase(StrEnum):
    """The parts of a step, in order. On a GPU the forward pass only starts in its phase; sampling waits for it.

    Pipelined, a step's forward pass and its sampling may run beside the other phases of its neighbours.
    """

    SCHEDULE = "schedule"
    BUILD = "build"
    FORWARD = "forward"
    SAMPLE = "sample"
    COMMIT = "commit"
    DELIVER = "deliver"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """One moment. The histograms of `phases` are in seconds."""

    phases: Mapping[Phase, HistogramCounts]
    rows: HistogramCounts  # per step
    tokens: HistogramCounts  # per step


class StepObservation:
    """Written by the engine's thread, read by any."""

    def __init__(self) -> None:
        self._phases = {phase: Histogram(PHASE_S) for phase in Phase}
        self._rows = Histogram(COUNTS)
        self._tokens = Histogram(COUNTS)

    def timed(self, phase: Phase, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work`, whose time counts as this phase's, unless there was nothing to do: None."""
        started_s = time.perf_counter()
        result = work(*args, **kwargs)
        if result is not None or phase is not Phase.SCHEDULE:
            self._phases[phase].observe(time.perf_counter() - started_s)
        return result

    def count(self, plan: StepPlan) -> None:
        """A step was computed."""
        self._rows.observe(len(plan.rows))
        self._tokens.observe(plan.num_tokens)

    def read(self) -> StepCounts:
        return StepCounts(
            phases={phase: histogram.read() for phase, histogram in self._phases.items()},
            rows=self._rows.read(),
            tokens=self._tokens.read(),
        )
