"""Limits of tenants, with a clock that the test turns: who is let in, what that costs, and what a new limit changes."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gralora_runtime.errors import ConfigError, DrainingError, QueueFullError, QuotaExceededError
from gralora_server.tenants.quotas import LOOKED_AT, Quotas
from gralora_server.tenants.settings import LimitSettings, TenancySettings, TenantSettings


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def limiting(**limits: object) -> TenancySettings:
    return TenancySettings(tenants={"acme": TenantSettings(limits=LimitSettings(**limits))})


def quotas(clock: Clock, **limits: object) -> Quotas:
    made = Quotas(clock)
    made.prepare(limiting(**limits))()
    return made


def run(limited: Quotas, *, prompt: int = 0, estimate: int = 0, output: int = 0, tenant: str = "acme") -> None:
    """A request that the engine takes on, and its end."""
    with limited.admit(tenant, estimate) as tab:
        tab.take_on()
        tab.start(prompt)
        tab.generate(output)


def refusal(limited: Quotas, estimate: int = 0) -> QuotaExceededError:
    with pytest.raises(QuotaExceededError) as refused, limited.admit("acme", estimate):
        pass
    return refused.value


def test_so_many_requests_a_second_and_no_more() -> None:
    clock = Clock()
    limited = quotas(clock, requests_per_s=2, burst_s=5)
    for _ in range(10):
        run(limited)
    refused = refusal(limited)

    assert (refused.tenant, refused.limit, refused.value) == ("acme", "requests_per_s", 2)
    assert refused.asked == "1 request"
    assert refused.retry_after_s == pytest.approx(0.5)
    clock.now_s += refused.retry_after_s
    run(limited)
    refusal(limited)


@given(
    st.floats(0.01, 1000),
    st.floats(0.01, 10_000),
    st.floats(0.1, 60),
    st.lists(st.tuples(st.floats(0, 5), st.integers(0, 3000), st.integers(0, 3000)), max_size=30),
)
def test_after_the_time_that_a_refusal_tells_one_is_let_in(
    requests: float, tokens: float, burst_s: float, wishes: list[tuple[float, int, int]]
) -> None:
    """Whichever limit it was."""
    clock = Clock()
    limited = quotas(clock, requests_per_s=requests, tokens_per_s=tokens, burst_s=burst_s)
    for pause_s, prompt, output in wishes:
        clock.now_s += pause_s
        try:
            run(limited, prompt=prompt, estimate=prompt // 2, output=output)
        except QuotaExceededError as refused:
            clock.now_s += refused.retry_after_s
            run(limited)


def test_tokens_are_charged_as_they_are_used_and_the_next_request_waits_for_the_debt() -> None:
    clock = Clock()
    limited = quotas(clock, tokens_per_s=100, burst_s=1)
    with limited.admit("acme", 10) as tab:
        tab.take_on()
        tab.start(60)  # not the ten that it looked like
        run(limited, prompt=1, estimate=1)
        for _ in range(100):
            tab.generate(4)
        refused = refusal(limited, 7)

    assert (refused.limit, refused.value, refused.asked) == ("tokens_per_s", 100, "about 7 tokens of a prompt")
    assert refused.retry_after_s == pytest.approx((461 - 100 + 1) / 100)
    clock.now_s += refused.retry_after_s
    run(limited)


def test_prompts_count_before_they_have_begun() -> None:
    """Or all would get in that come before the first token of the first."""
    limited = quotas(Clock(), tokens_per_s=100, burst_s=1)
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(limited.admit("acme", 50)).take_on()
        assert refusal(limited).limit == "tokens_per_s"


def test_only_so_many_at_the_same_time() -> None:
    limited = quotas(Clock(), streams=2)
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(limited.admit("acme", 0))
        refused = refusal(limited)
        with limited.admit("", 0), limited.admit("other", 0):
            pass
    with limited.admit("acme", 0):
        pass

    assert (refused.limit, refused.value, refused.asked) == ("streams", 2, "1 generation beside the 2 that run")
    assert refused.retry_after_s == 1.0


@pytest.mark.parametrize(
    "error", [QuotaExceededError("acme", "queued", 1, "more"), QueueFullError(1, 1), DrainingError()]
)
def test_who_is_refused_elsewhere_is_charged_nothing(error: Exception) -> None:
    clock = Clock()
    limited = quotas(clock, requests_per_s=1, tokens_per_s=100, burst_s=1, streams=1)
    for _ in range(100):
        with pytest.raises(type(error)), limited.admit("acme", 90):
            raise error

    run(limited)


def test_a_request_that_is_no_good_is_a_request_but_no_tokens() -> None:
    limited = quotas(Clock(), requests_per_s=2, tokens_per_s=100, burst_s=1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), limited.admit("acme", 90):
            raise ZeroDivisionError

    assert refusal(limited).limit == "requests_per_s"


def test_what_was_used_before_the_drain_is_charged() -> None:
    clock = Clock()
    limited = quotas(clock, requests_per_s=1, burst_s=1)
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(DrainingError))
        stack.enter_context(limited.admit("acme", 0)).take_on()
        raise DrainingError

    refusal(limited)


def test_a_request_that_never_came_to_a_token_keeps_its_estimate() -> None:
    """Or whoever leaves just before has the prompt computed for nothing, as often as he likes."""
    limited = quotas(Clock(), tokens_per_s=100, burst_s=1)
    with limited.admit("acme", 100) as tab:
        tab.take_on()

    assert refusal(limited).limit == "tokens_per_s"


def test_the_operator_and_whoever_has_no_settings_have_no_limits() -> None:
    limited = quotas(Clock(), requests_per_s=1, burst_s=1)
    for _ in range(100):
        run(limited, tenant="")
        run(limited, tenant="unknown")

    assert limited.share_of_uploads("") is None


def test_new_limits_hold_at_once_and_forget_nothing() -> None:
    clock = Clock()
    limited = quotas(clock, requests_per_s=1, tokens_per_s=10, burst_s=10, streams=9)
    with limited.admit("acme", 0) as tab:
        tab.take_on()
        tab.start(600)  # of 100
        put_in_force = limited.prepare(limiting(requests_per_s=5, tokens_per_s=100, burst_s=10, streams=1))
        assert refusal(limited).retry_after_s == pytest.approx(501 / 10)
        put_in_force()
        assert refusal(limited).limit == "streams"
    refused = refusal(limited)

    assert (refused.limit, refused.value) == ("tokens_per_s", 100)
    assert refused.retry_after_s == pytest.approx(501 / 100)


def test_limits_come_and_go() -> None:
    limited = quotas(Clock())
    run(limited)
    limited.prepare(limiting(requests_per_s=1, burst_s=2))()
    for _ in range(2):
        run(limited)
    refusal(limited)
    limited.prepare(TenancySettings())()

    run(limited)


@pytest.mark.parametrize("name", ["requests_per_s", "tokens_per_s"])
def test_a_rate_that_no_clock_can_follow_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"tenants.acme.limits.{name} must be at least 1e-06, got 1e-300"):
        Quotas().prepare(limiting(**{name: 1e-300}))


def test_tenants_that_come_and_go_leave_nothing() -> None:
    clock = Clock()
    limited = Quotas(clock)
    names = [f"t{index}" for index in range(5000)]
    limits = LimitSettings(requests_per_s=1, tokens_per_s=1, burst_s=1)
    limited.prepare(TenancySettings(tenants=dict.fromkeys(names, TenantSettings(limits=limits))))()
    for name in names:
        run(limited, tenant=name)
        clock.now_s += 1.0

    assert len(limited._allowances) <= LOOKED_AT + 2


def test_one_that_owes_hides_no_other_and_is_not_forgotten() -> None:
    clock = Clock()
    limited = Quotas(clock)
    limits = TenantSettings(limits=LimitSettings(tokens_per_s=1, burst_s=1))
    limited.prepare(TenancySettings(tenants={"debtor": limits} | {f"t{index}": limits for index in range(500)}))()
    run(limited, tenant="debtor", prompt=1_000_000)
    for index in range(500):
        run(limited, tenant=f"t{index}")
        clock.now_s += 1.0

    assert len(limited._allowances) <= LOOKED_AT + 3
    with pytest.raises(QuotaExceededError), limited.admit("debtor", 0):
        pass


@given(st.data())
def test_nobody_who_runs_is_forgotten(data: st.DataObject) -> None:
    clock, serials = Clock(), count()
    limited = Quotas(clock)
    limits = TenantSettings(limits=LimitSettings(streams=2))
    tenants = [f"t{index}" for index in range(6)]
    limited.prepare(TenancySettings(tenants=dict.fromkeys(tenants, limits)))()
    running: dict[int, tuple[str, ExitStack]] = {}
    for _ in range(data.draw(st.integers(1, 60))):
        if running and data.draw(st.booleans()):
            running.pop(data.draw(st.sampled_from(sorted(running))))[1].close()
            continue
        tenant = data.draw(st.sampled_from(tenants))
        here = sum(other == tenant for other, _ in running.values())
        with ExitStack() as stack:
            try:
                stack.enter_context(limited.admit(tenant, 0))
            except QuotaExceededError:
                assert here == 2
                continue
            assert here < 2
            running[next(serials)] = tenant, stack.pop_all()
