"""Steps that are summed up: any stretch of them has its own sums, and its own longest step."""

import random

from gralora_runtime.observation.step_log import StepLog
from gralora_runtime.plan import AdapterUse, RowPlan, StepPlan

BASE = AdapterUse(-1, 0, 0)


def step(*tokens: int) -> StepPlan:
    """Rows with so many tokens; those with one decode."""
    rows = tuple(RowPlan(f"r{at}", (5,) * count, 0, (), BASE, True, at) for at, count in enumerate(tokens))
    return StepPlan(rows, sum(count == 1 for count in tokens))


def test_a_stretch_has_the_sums_of_its_own_steps() -> None:
    log = StepLog()
    log.note(step(1, 1), 0.0, 1.0)
    before = log.sums
    log.note(step(1, 1, 7), 1.0, 3.0)
    log.note(step(1), 3.5, 4.0)
    found = log.sums.since(before)
    assert (found.steps, found.seconds, found.rows) == (2, 2.5, 4)
    assert (found.mixed_steps, found.mixed_s, found.prompt_tokens) == (1, 2.0, 7)


def test_a_pipelined_step_counts_from_when_the_one_before_had_ended() -> None:
    log = StepLog()
    log.note(step(1), 0.0, 1.0)
    log.note(step(1), 0.2, 1.5)
    assert log.last_s == 0.5


def test_the_longest_step_of_any_stretch_is_the_one_that_a_search_finds() -> None:
    rng, log, now_s = random.Random(3), StepLog(), 0.0
    gaps, sums = [], [log.sums]
    for _ in range(500):
        gaps.append(rng.random())
        log.note(step(1), now_s, now_s + gaps[-1])
        now_s += gaps[-1]
        sums.append(log.sums)
    for at in range(500):
        longest = log.longest(sums[at])
        assert longest is not None
        assert longest.number == max(range(at, 500), key=lambda number: (gaps[number], number))
    assert log.longest(log.sums) is None


def test_a_long_step_names_the_request_whose_prompt_was_longest() -> None:
    log = StepLog()
    log.note(step(1, 3, 9, 4), 0.0, 1.0)
    longest = log.longest(StepLog().sums)
    assert longest is not None
    assert (longest.rows, longest.prompt_tokens, longest.prompt_of) == (4, 16, "r2")
