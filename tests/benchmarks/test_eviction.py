"""The replay that chose who leaves the pool: what it counts, and that it gives the same numbers each time."""

from __future__ import annotations

import random

import pytest

from benchmarks.eviction import (
    ADAPTERS,
    DISK_BYTE_S,
    DISK_S,
    HOST_BYTE_S,
    HOST_S,
    LRU,
    POLICIES,
    RANK_BYTES,
    SERVED,
    SHIFT_EVERY,
    TRACES,
    Case,
    Outcome,
    Replay,
    replay_case,
    verdict,
)


def places(policy: str, *wanted: int, host_ranks: int = 0) -> list[str]:
    """Adapters of rank 8 in a pool for two of them."""
    run = Replay([8] * 10, POLICIES[policy], pool_ranks=16, host_ranks=host_ranks)
    for adapter in wanted:
        run.request(adapter)
    return run.places


def test_what_left_the_pool_comes_from_where_it_went() -> None:
    assert places(LRU, 0, 1, 0, 2, 0, 1) == ["disk", "disk", "pool", "disk", "pool", "disk"]
    assert places(LRU, 0, 1, 0, 2, 0, 1, host_ranks=8)[-1] == "host"
    assert places(LRU, 0, 1, 2, 3, 0, host_ranks=8)[-1] == "disk"  # 1 has taken its place


def test_a_favourite_survives_what_is_asked_for_once() -> None:
    wanted = [0, 0, 0, 1, 2, 3, 0]

    assert places(LRU, *wanted)[-1] == "disk"
    assert places(SERVED, *wanted)[-1] == "pool"


def test_waits_follow_from_sizes() -> None:
    run = Replay([8, 16], POLICIES[LRU], pool_ranks=16, host_ranks=16)
    for adapter in (0, 1, 0, 0):
        run.request(adapter)

    small = 8 * RANK_BYTES
    from_disk, from_host = DISK_S + small * DISK_BYTE_S, HOST_S + small * HOST_BYTE_S
    assert run.waits_s == pytest.approx([from_disk, DISK_S + 2 * small * DISK_BYTE_S, from_host, 0.0])


def test_a_seed_is_one_result() -> None:
    first, again, other = (replay_case(60, [seed], ("zipf 1.0 and scans", 0.1, 0.1)) for seed in (1, 1, 2))

    assert first == again != other
    assert first.outcomes.keys() == POLICIES.keys()
    assert all(0 < outcome.hit_rate < 1 for outcome in first.outcomes.values())


@pytest.mark.parametrize("trace", TRACES)
def test_a_trace_wants_adapters_that_there_are(trace: str) -> None:
    wanted = TRACES[trace](random.Random(1), SHIFT_EVERY + 1)

    assert len(wanted) >= SHIFT_EVERY + 1
    assert set(wanted) <= set(range(ADAPTERS))


def case(trace: str, ratio: float) -> Case:
    def outcome(wait_ms: float) -> Outcome:
        return Outcome(hit_rate=0, host_rate=0, disk_bytes=0, mean_wait_ms=wait_ms)

    return Case(trace=trace, pool_share=0, host_share=0, outcomes={LRU: outcome(10), SERVED: outcome(10 * ratio)})


@pytest.mark.parametrize(
    ("steady", "shifting", "better"),
    [
        ((0.9, 0.94, 1.01), 1.05, True),
        ((0.9, 0.96, 1.01), 1.0, False),
        ((0.9, 0.9, 1.02), 1.0, False),
        ((0.9, 0.9, 0.9), 1.06, False),
    ],
)
def test_clearly_better_is_what_was_decided(steady: tuple[float, ...], shifting: float, better: bool) -> None:
    cases = [*(case("zipf", ratio) for ratio in steady), case("shifting", shifting)]

    assert verdict(cases, SERVED)["clearly_better"] is better
