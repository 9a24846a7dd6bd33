"""What fuzzing takes for harm: each check, given what it is there for."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest

from benchmarks.fuzz.verdict import GROWTH_BYTES, LOST, Ending, growth_of, leftovers_of, problem_of
from gralora_runtime.info import EngineLoad

Code = grpc.StatusCode
IDLE = EngineLoad(
    running=0, waiting=0, waiting_for_adapter=0, paused=0, pages_total=8, pages_free=5, pages_cached=3, pages_leased=0,
    adapter_leases=0, adapter_slots_used=2, adapter_slots_total=4, adapter_pool_bytes_used=1,
    adapter_pool_bytes_total=2,
    steps=9, generated_tokens=9, preemptions=1, pauses=1, prefix_hit_tokens=3, request_failures=0, step_failures=0,
)  # fmt: skip


def test_an_answer_and_a_refusal_with_a_reason_are_as_it_should_be() -> None:
    assert problem_of(Ending(code=Code.OK)) is None
    assert problem_of(Ending(code=Code.INVALID_ARGUMENT, reason="INVALID_REQUEST")) is None


@pytest.mark.parametrize("code", [Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS])
def test_an_internal_error_is_harm_whatever_its_reason(code: Code) -> None:
    assert (
        problem_of(Ending(code=code, reason="INTERNAL", message="it broke")) == f"it ended with {code.name}: it broke"
    )


@pytest.mark.parametrize("code", [None, Code.DEADLINE_EXCEEDED])
def test_a_call_that_lasts_to_its_deadline_hangs(code: Code | None) -> None:
    assert problem_of(Ending(code=code, reason="DEADLINE_EXCEEDED")) == LOST


def test_a_refusal_without_a_reason_is_harm() -> None:
    found = problem_of(Ending(code=Code.NOT_FOUND, message="what?"))

    assert found == "it was refused with NOT_FOUND and no reason: what?"


def test_a_step_that_failed_is_harm_though_it_has_a_reason() -> None:
    found = problem_of(Ending(code=Code.UNAVAILABLE, reason="STEP_FAILED", message="our bug"))

    assert found == "the server failed or was gone: STEP_FAILED: our bug"


def test_memory_may_grow_by_a_twentieth_and_four_megabytes() -> None:
    first = 400 << 20
    allowed = first // 20 + GROWTH_BYTES

    assert growth_of(first, first + allowed) is None
    assert growth_of(first, first + allowed + 1) == "its memory grew by 24.0 MiB from 400 MiB"


def test_a_server_that_nobody_calls_holds_nothing() -> None:
    assert leftovers_of(IDLE) is None
    assert leftovers_of(replace(IDLE, adapter_leases=2)) == "left behind: 2 adapter leases"
    assert leftovers_of(replace(IDLE, pages_free=4)) == "left behind: 1 lost pages"
    assert leftovers_of(replace(IDLE, running=1, step_failures=3)) == "left behind: 1 running, 3 failures"
