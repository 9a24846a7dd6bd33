"""What a request's deltas become."""

from __future__ import annotations

import asyncio

import pytest
from support.fake_engine import finished, token

from gralora_runtime.errors import QueueFullError
from gralora_runtime.observation.requests import RequestMeter, RequestObservation, outcome_of
from gralora_runtime.request import Delta, Started


def first(token_id: int) -> Delta:
    facts = Started(prompt_tokens=3, cached_tokens=0, queue_time_s=0.5, seed=0, adapter="a", adapter_digest="d")
    return Delta(token_ids=(token_id,), started=facts)


def test_a_request_of_three_tokens_has_one_first_token_two_gaps_and_one_end() -> None:
    observed = RequestObservation(5)
    meter = RequestMeter(observed, submitted_s=10.0)
    meter.admit("a", num_prompt=3)
    meter.deliver(first(7), 12.0)
    meter.deliver(token(8), 12.25)
    meter.deliver(token(9), 12.75)
    meter.deliver(finished(), 13.0)
    read = observed.read()

    assert (read.queue.count, read.queue.sum) == (1, 0.5)
    assert (read.first_token.count, read.first_token.sum) == (1, 2.0)
    assert (read.inter_token.count, read.inter_token.sum) == (2, 0.75)
    assert (read.total.count, read.total.sum) == (1, 3.0)
    tally = read.adapters["a"]
    assert (tally.requests, tally.prompt_tokens, tally.generated_tokens) == (1, 3, 3)


def test_a_delta_of_several_tokens_spreads_its_gap_over_them() -> None:
    observed = RequestObservation(5)
    meter = RequestMeter(observed, submitted_s=0.0)
    meter.admit("", num_prompt=1)
    meter.deliver(first(7), 1.0)
    meter.deliver(Delta(token_ids=(8, 9)), 2.0)

    assert observed.read().inter_token.count == 2
    assert observed.read().inter_token.sum == 1.0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (QueueFullError("full", 1.0), "queue_full"),
        (asyncio.CancelledError(), "cancelled"),
        (KeyError("x"), "internal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_outcomes_are_few_whatever_goes_wrong(error: BaseException, expected: str) -> None:
    assert outcome_of(error) == expected
