"""What the engine's thread writes down."""

from __future__ import annotations

import pytest

from gralora_runtime.observation.steps import Phase, StepObservation
from gralora_runtime.plan import AdapterUse, RowPlan, StepPlan


def test_timed_passes_the_result_on_and_counts_one_value_of_its_phase() -> None:
    observed = StepObservation()

    assert observed.timed(Phase.BUILD, divmod, 7, 2) == (3, 1)
    counts = {phase: histogram.count for phase, histogram in observed.read().phases.items()}
    assert counts == dict.fromkeys(Phase, 0) | {Phase.BUILD: 1}


def test_a_phase_that_fails_fails_on() -> None:
    with pytest.raises(ZeroDivisionError):
        StepObservation().timed(Phase.FORWARD, divmod, 1, 0)


def test_a_step_counts_its_rows_and_tokens() -> None:
    base = AdapterUse(-1, 0, 0)
    rows = [
        RowPlan("a", (1,), 5, (0,), base, samples=True, seat=0),
        RowPlan("b", (1, 2, 3), 0, (1,), base, samples=True, seat=1),
    ]
    observed = StepObservation()
    observed.count(StepPlan(tuple(rows), 1))

    assert observed.read().rows.sum == 2
    assert observed.read().tokens.sum == 4
