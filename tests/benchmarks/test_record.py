"""Floors, by hand."""

from __future__ import annotations

from benchmarks.cost import Cost, ModelCost
from benchmarks.measurement import Answer, Contender, Run
from benchmarks.record import FIRST_LAST, FIRST_MEAN, STEP, WHOLE, rows_of
from benchmarks.workload import Request

COST = ModelCost(layer_params=100, head_params=10, adapter_params={"a": 7, "b": 3}, adapter_sizes={"a": 28, "b": 12})
REQUESTS = [Request("a", (1, 2, 3), 4), Request("b", (4, 5, 6), 4), Request("a", (7, 8, 9), 4)]


def test_an_adapter_is_read_once_and_computed_for_every_token_that_asks_for_it():
    assert Cost(4 * (110 + 10), 2 * (3 * 110 + 7 + 3 + 7)) == COST.decode(REQUESTS)


def test_a_merged_adapter_costs_nothing():
    assert Cost(4 * 110, 2 * 3 * 110) == COST.decode(REQUESTS, merged=True)


def test_a_prefill_needs_the_head_for_last_tokens_only():
    assert Cost(4 * 120, 2 * (9 * 100 + 3 * 10 + 3 * 17)) == COST.prefill(REQUESTS)


def test_a_whole_run_is_a_prefill_and_the_steps_after_its_token():
    prefill, steps = COST.whole(REQUESTS)

    assert COST.prefill(REQUESTS) == prefill
    assert steps.times == 3


def test_requests_that_come_one_by_one_have_no_common_first_token():
    run = Run((Answer(REQUESTS[0], (1, 2, 3, 4), (1.0, 2.0, 3.0, 4.0)),))
    contender = Contender(name="turns", run=lambda _: [run, run], one_by_one=True)

    rows = rows_of(contender, [[run, run]], COST)

    assert [row.measure for row in rows] == [WHOLE, STEP]
    assert rows[0].tokens == 4


def test_a_crowd_has_every_measure():
    run = Run(tuple(Answer(request, (1, 2, 3, 4), (1.0 + i, 4.0, 5.0, 6.0)) for i, request in enumerate(REQUESTS)))

    rows = rows_of(Contender(name="crowd", run=lambda _: [run]), [[run]], COST)

    assert {row.measure: row.samples_s for row in rows} == {
        WHOLE: [6.0],
        STEP: [1.0],
        FIRST_LAST: [3.0],
        FIRST_MEAN: [2.0],
    }
