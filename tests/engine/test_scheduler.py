"""What the scheduler promises: everybody moves, nothing leaks, and a neighbour changes nothing but the time."""

from __future__ import annotations

import random

from support.fakes import Harness, fake_lease, fake_sequence

from gralora_runtime.errors import DeadlineExceededError, NumericalError, RequestCancelledError
from gralora_runtime.request import StoppingParams
from gralora_runtime.sampling.outcome import SampledToken, SamplingFailure


def test_one_request_gets_its_tokens_and_leaves_nothing_behind() -> None:
    harness = Harness()
    harness.scheduler.add(fake_sequence("a", [1, 2, 3], max_tokens=3))
    harness.run()

    assert harness.tokens("a") == [103, 104, 105]
    assert harness.finish_reason("a") == "length"
    assert harness.pool.counts().leased == 0
    assert len(harness.released) == 1


def test_a_long_prompt_does_not_stall_those_that_stream() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.scheduler.add(fake_sequence("short", [1, 2], max_tokens=20))
    harness.step()
    harness.scheduler.add(fake_sequence("long", list(range(50)), max_tokens=1))
    for _ in range(7):
        plan = harness.step()
        assert plan is not None
        assert plan.rows[0].request_id == "short"
        assert plan.num_decode_rows == 1
        assert plan.num_tokens <= 8

    assert len(harness.tokens("short")) == 8


def test_only_the_last_chunk_of_a_prompt_samples() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.scheduler.add(fake_sequence("a", list(range(20)), max_tokens=1))
    harness.run()

    assert [row.samples for plan in harness.plans for row in plan.rows] == [False, False, True]
    assert [row.token_ids for plan in harness.plans for row in plan.rows] == [
        tuple(range(8)),
        tuple(range(8, 16)),
        tuple(range(16, 20)),
    ]


def test_a_second_request_with_the_same_prefix_computes_only_the_rest() -> None:
    harness = Harness(max_num_batched_tokens=64)
    harness.scheduler.add(fake_sequence("a", list(range(10)), max_tokens=1))
    harness.run()
    harness.scheduler.add(fake_sequence("b", [*range(10), 99], max_tokens=1))
    harness.step()

    assert harness.plans[-1].rows[0].token_ids == (8, 9, 99)
    started = harness.outputs["b"][0].delta.started
    assert started.cached_tokens == 8


def test_the_same_prompt_for_another_adapter_is_computed_from_its_first_token() -> None:
    harness = Harness(max_num_batched_tokens=64)
    harness.scheduler.add(fake_sequence("a", list(range(10)), max_tokens=1, lease=fake_lease("digest-a", 0)))
    harness.run()
    harness.scheduler.add(fake_sequence("b", list(range(10)), max_tokens=1, lease=fake_lease("digest-b", 0)))
    harness.step()

    assert harness.plans[-1].rows[0].start == 0


def test_generated_tokens_are_found_as_prefix_by_the_next_turn() -> None:
    harness = Harness(max_num_batched_tokens=64)
    harness.scheduler.add(fake_sequence("a", list(range(4)), max_tokens=6))
    harness.run()
    harness.scheduler.add(fake_sequence("b", [*range(4), *harness.tokens("a")], max_tokens=1))
    harness.step()

    assert harness.plans[-1].rows[0].start == 8


def test_when_pages_run_out_the_youngest_is_preempted_and_finishes_later_with_the_same_tokens() -> None:
    alone = {}
    for name in "abc":
        harness = Harness()
        harness.scheduler.add(fake_sequence(name, [ord(name)] * 6, max_tokens=14))
        harness.run()
        alone[name] = harness.tokens(name)

    crowded = Harness(num_pages=8)  # three sequences of 20 tokens need 15 pages
    for name in "abc":
        crowded.scheduler.add(fake_sequence(name, [ord(name)] * 6, max_tokens=14))
    crowded.run()

    assert alone == {name: crowded.tokens(name) for name in "abc"}
    assert crowded.scheduler.counters.preemptions > 0
    assert crowded.outputs["a"][-1].delta.finished.preemptions == 0
    assert len(crowded.released) == 3


def test_a_preempted_request_keeps_its_lease_until_its_end() -> None:
    harness = Harness(num_pages=4)
    for name in "ab":
        harness.scheduler.add(fake_sequence(name, [ord(name)] * 6, max_tokens=8))
    while not harness.scheduler.counters.preemptions:
        harness.step()

    assert harness.released == []


def test_no_step_exceeds_its_rows_or_its_tokens() -> None:
    harness = Harness(max_num_seqs=3, max_num_batched_tokens=7)
    for index in range(10):
        harness.scheduler.add(fake_sequence(str(index), [index] * (index + 1), max_tokens=5))
    harness.run()

    assert max(len(plan.rows) for plan in harness.plans) == 3
    assert max(plan.num_tokens for plan in harness.plans) <= 7
    assert all(len(row.token_ids) == 1 for plan in harness.plans for row in plan.rows[: plan.num_decode_rows])
    assert all(len(row.token_ids) > 1 for plan in harness.plans for row in plan.rows[plan.num_decode_rows :])


def test_cancelling_frees_a_running_and_a_waiting_request_at_once() -> None:
    harness = Harness(max_num_seqs=1)
    for name in "ab":
        harness.scheduler.add(fake_sequence(name, [1, 2, 3], max_tokens=50))
    harness.step()
    harness.scheduler.cancel("a")
    harness.scheduler.cancel("b")
    harness.scheduler.cancel("never heard of")

    assert not harness.scheduler.has_work
    assert harness.pool.counts().leased == 0
    assert len(harness.released) == 2
    harness.step()
    assert harness.finish_reason("a") == "cancelled"
    assert isinstance(harness.outputs["b"][-1].error, RequestCancelledError)


def test_a_deadline_ends_a_waiting_request_with_an_error_and_a_started_one_with_what_it_has() -> None:
    harness = Harness(max_num_seqs=1)
    harness.scheduler.add(fake_sequence("started", [1], max_tokens=50, deadline_s=5.0))
    harness.scheduler.add(fake_sequence("waiting", [1], max_tokens=50, deadline_s=5.0))
    harness.step()
    harness.clock.now_s = 5.0
    harness.step()

    assert harness.finish_reason("started") == "deadline"
    assert isinstance(harness.outputs["waiting"][-1].error, DeadlineExceededError)
    assert len(harness.released) == 2


def test_a_row_without_a_token_fails_alone() -> None:
    harness = Harness()
    for name in "ab":
        harness.scheduler.add(fake_sequence(name, [1, 2], max_tokens=2))
    plan = harness.scheduler.plan()
    good = harness._next_token("a", 2)
    outputs = harness.scheduler.commit(plan, [SampledToken(good), SamplingFailure("logits are NaN")])
    errors = {output.request_id: output.error for output in outputs}

    assert errors["a"] is None
    assert isinstance(errors["b"], NumericalError)
    assert harness.scheduler.num_running == 1
    harness.scheduler.check_integrity()


def test_the_token_that_stops_is_reported_but_is_no_text() -> None:
    harness = Harness(next_token=lambda _, context_len: 1 if context_len == 4 else 50)
    harness.scheduler.add(fake_sequence("a", [9, 9, 9], max_tokens=9, stopping=StoppingParams()))
    harness.run()
    deltas = [output.delta for output in harness.outputs["a"]]

    assert [delta.text for delta in deltas] == ["<50>", ""]
    assert harness.tokens("a") == [50, 1]
    assert deltas[-1].finished.stop_token_id == 1


def test_min_tokens_outlasts_an_early_stop_token() -> None:
    harness = Harness(next_token=lambda *_: 77)
    stopping = StoppingParams(stop_token_ids=(77,), min_tokens=3)
    harness.scheduler.add(fake_sequence("a", [9], max_tokens=9, stopping=stopping))
    harness.run()

    assert harness.tokens("a") == [77, 77, 77]
    assert harness.finish_reason("a") == "stop"


def test_a_random_crowd_that_comes_goes_and_is_cancelled_leaves_nothing_behind() -> None:
    """And everybody who was not cancelled has the tokens that it would have had alone."""
    rng = random.Random(1)
    harness = Harness(num_pages=12, max_num_seqs=5, max_num_batched_tokens=9)
    cancelled: set[str] = set()
    for index in range(120):
        name = str(index)
        prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 20))]
        harness.scheduler.add(
            fake_sequence(name, prompt, max_tokens=rng.randrange(1, 12), lease=fake_lease(rng.choice(["x", "y"]), 0))
        )
        if rng.random() < 0.3:
            victim = str(rng.randrange(index + 1))
            harness.scheduler.cancel(victim)
            cancelled.add(victim)
        harness.step()
    harness.run()

    assert harness.pool.counts().leased == 0
    assert len(harness.released) == 120
    for name in set(harness.outputs) - cancelled:
        tokens = harness.tokens(name)
        prompt_len = harness.outputs[name][-1].delta.finished.prompt_tokens
        assert tokens == [100 + prompt_len + i for i in range(len(tokens))]


def test_computed_tokens_are_counted_as_prefill_or_decode_also_after_preemption() -> None:
    """A prompt of one token is prefill; tokens that are computed again after a preemption are prefill again."""
    harness = Harness(max_num_batched_tokens=8)
    harness.scheduler.add(fake_sequence("one", [1], max_tokens=3))
    harness.scheduler.add(fake_sequence("long", list(range(20)), max_tokens=2))
    harness.run()
    counters = harness.scheduler.counters

    assert (counters.prefill_tokens, counters.decode_tokens, counters.generated_tokens) == (21, 3, 5)

    cramped = Harness(num_pages=4, page_size=4, max_num_batched_tokens=16)
    for name in ("a", "b"):
        cramped.scheduler.add(fake_sequence(name, [ord(name), *range(5)], max_tokens=8))
    cramped.run()
    counters = cramped.scheduler.counters
    computed = sum(plan.num_tokens for plan in cramped.plans)

    assert counters.preemptions > 0
    assert counters.prefill_tokens > 12
    assert counters.prefill_tokens + counters.decode_tokens == computed


def test_adapters_are_told_by_where_their_requests_stand() -> None:
    harness = Harness(max_num_seqs=1)
    for name in ("a", "b"):
        sequence = fake_sequence(name, [1, 2], max_tokens=2)
        sequence.adapter_name = name
        harness.scheduler.add(sequence)
    before = harness.scheduler.adapters()
    harness.step()

    assert before == (set(), {"a", "b"})
    assert harness.scheduler.adapters() == ({"a"}, {"b"})
