"""Who only looks sees where each request stands, what keeps the waiting ones, and how many come before them."""

from __future__ import annotations

from support.fakes import Harness, fake_sequence

from gralora_runtime.observation.activity import RequestActivity
from gralora_runtime.observation.holdups import Hold
from gralora_runtime.observation.timeline import Stage
from gralora_runtime.scheduling.onlooker import look


def seen(harness: Harness, now_s: float = 0.0) -> dict[str, RequestActivity]:
    return {one.request_id: one for one in look(harness.scheduler, now_s)}


def test_a_request_goes_from_waiting_through_its_prompt_to_its_answer() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.scheduler.add(fake_sequence("a", list(range(12)), max_tokens=3))
    stages = [seen(harness)["a"]]
    for _ in range(3):
        harness.step()
        stages.append(seen(harness)["a"])

    assert [one.stage for one in stages] == [Stage.QUEUE, Stage.PREFILL, Stage.DECODE, Stage.DECODE]
    assert [one.computed_tokens for one in stages] == [0, 8, 12, 13]
    assert [one.output_tokens for one in stages] == [0, 0, 1, 2]
    assert {one.prompt_tokens for one in stages} == {12}
    assert {one.max_tokens for one in stages} == {3}


def test_who_lacks_a_row_is_told_apart_from_who_lacks_pages() -> None:
    of_rows, of_pages = Harness(max_num_seqs=1), Harness(num_pages=6, max_num_batched_tokens=64)
    for harness in (of_rows, of_pages):
        harness.scheduler.add(fake_sequence("a", list(range(16)), max_tokens=8))
        harness.step()
        harness.scheduler.add(fake_sequence("b", list(range(50, 66)), max_tokens=8))
        harness.step()

    assert seen(of_rows)["b"].hold is Hold.PLACE
    assert seen(of_pages)["b"].hold is Hold.PAGES
    assert seen(of_rows)["a"].hold is None


def test_who_could_start_waits_for_its_turn_alone() -> None:
    harness = Harness()
    harness.scheduler.add(fake_sequence("a", [1, 2, 3]))

    assert seen(harness)["a"].hold is Hold.TURN


def test_those_before_one_are_counted_as_they_would_be_served() -> None:
    harness = Harness(max_num_seqs=1)
    harness.scheduler.add(fake_sequence("first", [1, 2, 3], tenant="busy", max_tokens=20))
    harness.step()
    for name, tenant, priority in (("b", "busy", 0), ("c", "busy", 1), ("d", "new", 0)):
        harness.scheduler.add(fake_sequence(name, [1, 2, 3], tenant=tenant, priority=priority))
    served = harness.scheduler.ledger.tenants()
    served["busy"].served, served["new"].served = 9.0, 1.0

    assert {name: one.ahead for name, one in seen(harness).items()} == {"first": 0, "d": 0, "c": 1, "b": 2}


def test_a_paused_request_and_one_that_gave_way_say_so() -> None:
    harness = Harness()
    for name in "ab":
        harness.scheduler.add(fake_sequence(name, [1, 2, 3], max_tokens=9))
    harness.step()
    harness.scheduler.pause("a")
    harness.scheduler._preempt(harness.scheduler.sequence("b"), {}, Hold.PAGES, harness.scheduler.sequence("a"))
    found = seen(harness, now_s=7.0)

    assert found["a"].stage is Stage.PAUSED
    assert (found["b"].stage, found["b"].preemptions) == (Stage.PREEMPTED, 1)
    assert found["a"].age_s == 7.0
