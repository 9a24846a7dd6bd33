"""The server in simulated time: what must come out can be reckoned by hand."""

from __future__ import annotations

import pytest

from gralora_runtime.adapters.residency.eviction import HALF_LIFE
from gralora_server.loadtest.record import RequestRecord
from gralora_server.loadtest.trace import Trace, TraceRequest
from gralora_server.planner.profile import Profile
from gralora_server.planner.residency import Residency
from gralora_server.planner.simulate import ServerPlan, simulate

from .profiles import STEP_S, TOKEN_S, profile, server

A, B = 100, 200  # bytes of two adapters


def request(at_s: float = 0.0, adapter: str = "", prompt: int = 21, output: int = 3) -> TraceRequest:
    return TraceRequest(arrival_s=at_s, adapter=adapter, prompt_tokens=prompt, output_tokens=output, seed=0)


def records(
    *requests: TraceRequest,
    with_profile: Profile | None = None,
    plan: ServerPlan | None = None,
    warm: bool = False,
    concurrency: int | None = None,
) -> list[RequestRecord]:
    trace = Trace(requests=requests, warmup_s=0.0, duration_s=10.0, concurrency=concurrency)
    done = simulate(trace, with_profile or profile(), plan or server(), {"a": A, "b": B}, warm=warm)
    return sorted(done.records, key=lambda record: record.intended_s)


PREFILL_S = STEP_S + 20 * TOKEN_S  # 21 tokens


def test_a_lone_request_takes_its_steps() -> None:
    (record,) = records(request(1.0), with_profile=profile(request_s=0.5))

    assert record.token_times_s == pytest.approx(
        [1.5 + PREFILL_S, 1.5 + PREFILL_S + STEP_S, 1.5 + PREFILL_S + 2 * STEP_S]
    )
    assert record.ok
    assert record.counted


def test_who_comes_during_a_step_waits_for_the_next() -> None:
    _, late = records(request(0.0), request(0.001))

    # The step in which it is taken has the first one's second token as well: 22 tokens.
    assert late.token_times_s[0] == pytest.approx(PREFILL_S + STEP_S + 21 * TOKEN_S)


def test_long_prompts_are_taken_in_chunks() -> None:
    (record,) = records(request(prompt=100, output=1))

    assert record.token_times_s == pytest.approx([2 * STEP_S + (63 + 35) * TOKEN_S])


def test_more_than_fit_a_step_wait_for_a_place() -> None:
    first, second = records(request(), request(0.0001), plan=server(max_num_seqs=1))

    assert second.token_times_s[0] == pytest.approx(first.finished_s + PREFILL_S)


def test_a_closed_loop_asks_again_until_the_time_is_over() -> None:
    done = records(request(), concurrency=2)

    assert all(record.intended_s < 10.0 for record in done)
    assert done[-1].finished_s >= 10.0
    assert {record.intended_s for record in done[2:]} <= {record.finished_s for record in done}


def test_an_adapter_is_loaded_once_and_read_by_its_bytes() -> None:
    costly = profile(load_byte_s=0.001, adapter_byte_s=0.01)

    first, second = records(request(0.0, "a"), request(50.0, "a"), with_profile=costly)

    assert first.ttft_s == pytest.approx(A * 0.001 + PREFILL_S + A * 0.01)
    assert second.ttft_s == pytest.approx(PREFILL_S + A * 0.01)


def test_what_is_warm_needs_no_load() -> None:
    (record,) = records(request(0.0, "a"), with_profile=profile(load_byte_s=0.001), warm=True)

    assert record.ttft_s == pytest.approx(PREFILL_S)


def test_steps_go_slower_while_an_adapter_is_loaded() -> None:
    slow = profile(load_byte_s=0.001, load_slowdown=1.0)

    base, loaded = records(request(0.0, output=8), request(0.01, "a"), with_profile=slow)

    # The load lasts 0.1 s from the end of the first step; each step meanwhile takes twice its time.
    assert base.token_times_s[1] - base.token_times_s[0] == pytest.approx(2 * STEP_S)
    assert loaded.ttft_s is not None
    assert loaded.ttft_s > 0.1


def test_a_pool_full_of_leased_adapters_makes_others_wait() -> None:
    first, second = records(request(0.0, "a"), request(0.0001, "b"), plan=server(adapter_pool_bytes=B))

    assert second.token_times_s[0] > first.finished_s


def pool(*, pool_bytes: int, max_slots: int = 9) -> Residency:
    return Residency([10, 10, 10, 10], pool_bytes=pool_bytes, max_slots=max_slots, load_byte_s=1.0)


def test_the_adapter_that_was_used_least_leaves_though_it_was_used_last() -> None:
    """As from the server's pool. The simulation used to have a policy of its own: the least recently used one left."""
    residency = pool(pool_bytes=20)
    for adapter in (0, 0, 0, 1, 2):
        residency.acquire(adapter, 0.0)
        residency.release(adapter)
    loads = residency.loads

    residency.acquire(0, 100.0)

    assert residency.loads == loads == 3
    assert residency.evicted_bytes == 10


def test_favourites_of_yesterday_leave() -> None:
    """Though they were used more often in all."""
    residency = pool(pool_bytes=20)
    for adapter in (*[0] * (3 * HALF_LIFE // 2), *[1] * HALF_LIFE, 2):
        residency.acquire(adapter, 0.0)
        residency.release(adapter)

    residency.acquire(1, 100.0)
    assert residency.loads == 3
    residency.acquire(0, 100.0)
    assert residency.loads == 4


def test_an_adapter_that_is_used_again_stays() -> None:
    residency = pool(pool_bytes=20)
    for adapter in (0, 1, 0, 2):  # 1 has to go
        assert residency.acquire(adapter, 0.0) is not None
        residency.release(adapter)
    loads = residency.loads

    for adapter in (0, 2):
        residency.acquire(adapter, 100.0)

    assert residency.loads == loads == 3
    assert residency.evicted_bytes == 10
    assert residency.acquire(1, 100.0) is None  # both are leased


def test_loads_are_done_one_after_another() -> None:
    residency = pool(pool_bytes=40)

    assert [residency.acquire(adapter, 0.0) for adapter in (0, 1, 0)] == [10.0, 20.0, 10.0]
    assert residency.busy_until_s(5.0) == 10.0
    assert residency.busy_until_s(15.0) == 20.0
    assert residency.busy_until_s(25.0) is None


def test_there_are_so_many_slots() -> None:
    residency = pool(pool_bytes=40, max_slots=1)

    assert residency.acquire(0, 0.0) is not None
    assert residency.acquire(1, 0.0) is None


def test_a_warm_pool_has_the_first_ones_and_loses_the_last_of_them_first() -> None:
    residency = pool(pool_bytes=20)
    residency.fill()

    residency.acquire(2, 0.0)  # in place of 1
    residency.acquire(0, 0.0)

    assert residency.loads == 1
