"""Points say what the last ten seconds were like, whatever came before."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.fake_engine import LOAD, activity

from gralora_runtime.observation.requests import RequestObservation
from gralora_runtime.observation.steps import Phase, StepObservation
from gralora_server.live.history import MAX_POINTS, History


def noted(history: History, at_s: float, *, tokens: int = 0, steps: int = 0, **changes: object) -> None:
    history.note(at_s, activity(load=replace(LOAD, generated_tokens=tokens, steps=steps), **changes))


def test_rates_are_of_the_last_ten_seconds() -> None:
    history = History()
    for second in range(31):
        noted(history, 100.0 + second, tokens=5000 if second >= 15 else 0)
    rates = history.points(0)["generated_tokens_per_s"]

    assert rates[14] == 0
    assert rates[15] == rates[24] == 500
    assert rates[26] == 0


def test_percentiles_are_of_what_came_meanwhile_and_of_nothing_there_are_none() -> None:
    history, observed = History(), RequestObservation(10)
    observed.first_token.observe(100.0)  # long ago
    noted(history, 1.0, first_token=observed.first_token.read())
    for _ in range(10):
        observed.first_token.observe(0.2)
    noted(history, 2.0, first_token=observed.first_token.read())
    points = history.points(0)

    assert points["first_token_p50"] == [None, pytest.approx(0.175)]
    assert points["between_p99"] == [None, None]


def test_the_phases_are_of_an_average_step() -> None:
    history, steps = History(), StepObservation()
    before = {str(phase): counts for phase, counts in steps.read().phases.items()}
    for _ in range(4):
        steps._phases[Phase.FORWARD].observe(0.5)
    after = {str(phase): counts for phase, counts in steps.read().phases.items()}
    noted(history, 1.0, steps=10, phases=before)
    noted(history, 2.0, steps=14, phases=after)

    assert history.step_phases() == {str(phase): 0.5 if phase is Phase.FORWARD else 0 for phase in Phase}


def test_who_has_seen_some_is_told_of_the_others_and_old_ones_are_forgotten() -> None:
    history = History()
    for second in range(MAX_POINTS + 50):
        noted(history, float(second))

    assert history.points(MAX_POINTS + 47.0)["at_s"] == [MAX_POINTS + 48.0, MAX_POINTS + 49.0]
    assert len(history.points(-1)["at_s"]) == MAX_POINTS


def test_a_clock_that_is_set_back_gives_no_rates_below_zero() -> None:
    history = History()
    for at_s, tokens in ((100.0, 10), (50.0, 20), (51.0, 30)):
        noted(history, at_s, tokens=tokens)

    assert history.points(0)["generated_tokens_per_s"] == [0, 0, 10]
