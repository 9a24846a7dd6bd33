"""A rate, with a clock that the test turns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gralora_server.tenants.bucket import TokenBucket

rates = st.floats(1e-6, 1e9)
bursts = st.floats(1e-3, 1e6)
starts = st.floats(0, 1e9)
pauses = st.floats(0, 1e5)
amounts = st.integers(-1000, 10_000_000)


def used(rate: float, burst_s: float, start_s: float, uses: list[tuple[float, int]]) -> tuple[TokenBucket, float]:
    """A bucket that has a past, and the time."""
    bucket, now_s = TokenBucket(rate, burst_s, start_s), start_s
    for pause_s, units in uses:
        now_s += pause_s
        bucket.charge(units, now_s)
    return bucket, now_s


@given(rates, bursts, starts, st.lists(st.tuples(pauses, amounts), max_size=20))
def test_after_exactly_the_time_that_was_told_one_is_let_in(
    rate: float, burst_s: float, start_s: float, uses: list[tuple[float, int]]
) -> None:
    bucket, now_s = used(rate, burst_s, start_s, uses)

    wait_s = bucket.wait_s(now_s)

    assert bucket.wait_s(now_s + wait_s) == 0


def test_a_wait_that_is_rounded_is_not_too_short() -> None:
    """Half of what tells two such times apart is lost when they are subtracted, and again when they are added."""
    bucket, now_s = TokenBucket(1.0, 1.0, 0.0), 2.0**-10
    bucket.charge(2.0**43 + 2.0**-9, 0.0)

    assert bucket.wait_s(now_s + bucket.wait_s(now_s)) == 0


@given(rates, bursts, starts, st.lists(st.tuples(pauses, amounts), max_size=20))
def test_nobody_is_told_to_wait_for_longer_than_necessary(
    rate: float, burst_s: float, start_s: float, uses: list[tuple[float, int]]
) -> None:
    bucket, now_s = used(rate, burst_s, start_s, uses)

    wait_s = bucket.wait_s(now_s)

    assert wait_s < 0.01 or bucket.wait_s(now_s + wait_s * 0.999) > 0


@given(
    st.floats(0.1, 1000),
    st.floats(0.1, 100),
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5000)), min_size=1, max_size=200),
)
def test_over_time_the_rate_is_kept_whatever_a_use_turns_out_to_be(
    rate: float, burst_s: float, wishes: list[tuple[float, int]]
) -> None:
    bucket, now_s, total, last = TokenBucket(rate, burst_s, 0.0), 0.0, 0, 0
    for pause_s, units in wishes:
        now_s += pause_s
        if bucket.wait_s(now_s) == 0:
            bucket.charge(units, now_s)
            total, last = total + units, units

    assert total - last <= (max(rate * burst_s, 1) + rate * now_s) * (1 + 1e-9) + rate * 1e-5


def test_a_burst_is_let_in_to_the_last_unit() -> None:
    bucket = TokenBucket(5.0, 10.0, 1234.5)
    let_in = 0
    while bucket.wait_s(1234.5) == 0:
        bucket.charge(1, 1234.5)
        let_in += 1

    assert let_in == 50
    assert abs(bucket.wait_s(1234.5) - 0.2) < 1e-9


def test_less_than_one_in_a_burst_is_one() -> None:
    bucket = TokenBucket(0.01, 10.0, 0.0)

    assert bucket.wait_s(0.0) == 0
    bucket.charge(1, 0.0)
    assert 99.9 < bucket.wait_s(0.0) < 100.1


def test_a_debt_is_paid_before_anybody_is_let_in() -> None:
    bucket = TokenBucket(10.0, 10.0, 0.0)
    bucket.charge(500, 0.0)  # of 100

    assert 40.0 < bucket.wait_s(0.0) < 40.2
    assert bucket.wait_s(40.2) == 0


def test_what_was_not_used_after_all_is_there_again_but_no_more_than_fits() -> None:
    bucket = TokenBucket(10.0, 1.0, 0.0)
    bucket.charge(30, 0.0)
    bucket.charge(-30, 0.0)
    bucket.charge(-1000, 0.0)
    assert bucket.is_full(0.0)
    bucket.charge(10, 0.0)

    assert bucket.wait_s(0.0) > 0


@given(rates, rates, bursts, st.integers(0, 100_000))
def test_another_rate_changes_neither_what_is_there_nor_what_is_owed(
    before: float, after: float, burst_s: float, debt: int
) -> None:
    """As many units, which come at another rate."""
    bucket = TokenBucket(before, burst_s, 0.0)
    bucket.charge(max(before * burst_s, 1) + debt, 0.0)  # all, and a debt
    bucket.change(after, burst_s, 0.0)

    expected_s = (debt + 1) / after
    assert abs(bucket.wait_s(0.0) - expected_s) <= 1e-5 * expected_s + 2e-6 + 1e-9 * (before * burst_s) / after


def test_a_smaller_bucket_spills() -> None:
    bucket = TokenBucket(100.0, 100.0, 0.0)
    bucket.change(1.0, 2.0, 0.0)
    bucket.charge(2, 0.0)

    assert bucket.wait_s(0.0) > 0
