"""How much may wait, of whom, and what is foretold of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gralora_runtime.adapters.residency.lease import BASE_LEASE
from gralora_runtime.backlog import Backlog, Place
from gralora_runtime.errors import QueueFullError
from gralora_runtime.forecast import SHORTEST_RETRY_S, Forecast, StepTimes
from gralora_runtime.plan import AdapterUse, RowPlan, StepPlan
from gralora_runtime.request import GenerationRequest, Prompt

BASE = AdapterUse(BASE_LEASE.slot, BASE_LEASE.generation, BASE_LEASE.width)


def ask(tenant: str = "a", **limits: int) -> GenerationRequest:
    return GenerationRequest(request_id="r", prompt=Prompt(text="x"), tenant=tenant, **limits)  # type: ignore[arg-type]


def fill(backlog: Backlog, tenant: str) -> int:
    """As many requests of a tenant as are let in."""
    count = 0
    while True:
        try:
            backlog.check_requests(ask(tenant), tenant, 1.0)
        except QueueFullError:
            return count
        backlog.enter(tenant, 1.0)
        count += 1


def test_one_tenant_leaves_room_for_others_and_each_next_one_too() -> None:
    backlog = Backlog(max_requests=1000, max_tokens=1 << 20)

    assert fill(backlog, "flood") == 800
    assert fill(backlog, "second") == 160
    assert fill(backlog, "third") == 32


def test_all_together_are_never_too_many() -> None:
    backlog = Backlog(max_requests=10, max_tokens=1 << 20)
    let_in = sum(fill(backlog, str(index)) for index in range(20))

    assert let_in == backlog.requests == 10
    with pytest.raises(QueueFullError, match=r"10 requests are under way; try again in 2\.5 s"):
        backlog.check_requests(ask("late"), "late", 2.5)


def test_a_tenants_own_limits_hold() -> None:
    backlog = Backlog(max_requests=100, max_tokens=1 << 20)
    places = [backlog.enter("a", 1.0) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests of this tenant are waiting, its limit queued_requests is 3"):
        backlog.check_requests(ask(max_queued_requests=3), "a", 1.0)
    backlog.start(places[0])
    backlog.check_requests(ask(max_queued_requests=3), "a", 1.0)
    backlog.count(places[1], 80)
    with pytest.raises(QueueFullError, match="of 80 tokens of this tenant are waiting, its limit queued_tokens is 100"):
        backlog.check_tokens(ask(max_queued_tokens=100), places[2], 21, 1.0)
    backlog.check_tokens(ask(max_queued_tokens=100), places[2], 20, 1.0)


def test_a_prompt_that_is_alone_is_never_too_long_and_a_second_one_is() -> None:
    backlog = Backlog(max_requests=100, max_tokens=50)
    first, second = backlog.enter("a", 1.0), backlog.enter("b", 1.0)
    backlog.check_tokens(ask(max_queued_tokens=10), first, 60, 1.0)
    backlog.count(first, 60)
    with pytest.raises(QueueFullError, match="prompts of 60 tokens are waiting"):
        backlog.check_tokens(ask("b"), second, 1, 1.0)
    backlog.start(first)
    backlog.check_tokens(ask("b"), second, 1, 1.0)


@given(st.lists(st.tuples(st.sampled_from("ecsl"), st.integers(0, 9), st.sampled_from("abc")), max_size=80))
@settings(deadline=None)
def test_the_sums_are_those_of_the_requests(actions: list[tuple[str, int, str]]) -> None:
    backlog = Backlog(max_requests=1000, max_tokens=1 << 20)
    places: list[Place] = []
    for action, index, tenant in actions:
        if action == "e":
            places.append(backlog.enter(tenant, 2.0 if tenant == "b" else 1.0))
        elif places:
            place = places[index % len(places)]
            if action == "c" and not place.tokens and not place.runs:
                backlog.count(place, index + 1)
            elif action == "s":
                backlog.start(place)
            elif action == "l":
                places.remove(place)
                backlog.leave(place)
        waiting = [place for place in places if not place.runs]
        lines = {place.line.tenant: place.line for place in places}

        assert backlog.requests == len(places) == sum(line.requests for line in lines.values())
        assert backlog.waiting == len(waiting)
        assert backlog.waiting_tokens == sum(place.tokens for place in waiting)
        assert backlog.weight == sum(line.weight for line in lines.values())
        for line in lines.values():
            assert line.waiting_tokens == sum(place.tokens for place in waiting if place.line is line)


def step(prompt_tokens: int, decoding: int) -> StepPlan:
    rows = [RowPlan(str(i), (1,), 5, (), BASE, True, i) for i in range(decoding)]
    if prompt_tokens:
        rows.append(RowPlan("p", tuple(range(prompt_tokens)), 0, (), BASE, True, decoding))
    return StepPlan(tuple(rows), decoding)


def foretelling(*, rows: int = 4) -> tuple[Backlog, Forecast]:
    """Of a server whose steps take 0.1 s and a prompt's token 0.01, and whose answers have 11 tokens."""
    backlog, steps = Backlog(max_requests=10_000, max_tokens=1 << 20), StepTimes()
    steps.observe(step(0, 4), 0.1)
    steps.observe(step(50, 4), 0.6)
    forecast = Forecast(backlog, steps, max_num_seqs=rows)
    forecast.ended(since_first_token_s=2.0, num_output=11)
    return backlog, forecast


def wait(backlog: Backlog, tenant: str, count: int, tokens: int = 0, *, running: bool = False) -> list[Place]:
    places = [backlog.enter(tenant, 1.0) for _ in range(count)]
    for place in places:
        backlog.count(place, tokens)
        if running:
            backlog.start(place)
    return places


def test_nothing_is_foretold_of_who_is_alone_or_before_anything_was_seen() -> None:
    backlog, forecast = foretelling()
    (alone,) = wait(backlog, "a", 1)
    unknown = Forecast(backlog, StepTimes(), max_num_seqs=4)

    assert forecast.estimate(alone, num_prompt=10, max_tokens=5) is None
    wait(backlog, "b", 1)
    assert forecast.estimate(alone, num_prompt=10, max_tokens=5) is not None
    assert unknown.estimate(alone, num_prompt=10, max_tokens=5) is None


def test_where_there_are_rows_only_the_prompt_takes_time() -> None:
    backlog, forecast = foretelling()
    wait(backlog, "a", 3, running=True)
    (place,) = wait(backlog, "a", 1)
    estimate = forecast.estimate(place, num_prompt=20, max_tokens=6)

    assert estimate is not None
    assert estimate.first_token_s == pytest.approx(20 * 0.01 + 0.1)
    assert estimate.last_token_s == pytest.approx(20 * 0.01 + 0.1 + 5 * 0.1)


def test_whose_rows_are_taken_waits_for_as_many_to_end() -> None:
    backlog, forecast = foretelling()
    wait(backlog, "a", 4, running=True)
    wait(backlog, "a", 7)
    (place,) = wait(backlog, "a", 1)
    estimate = forecast.estimate(place, num_prompt=20, max_tokens=None)

    assert estimate is not None
    assert estimate.first_token_s == pytest.approx(8 * 2.0 / 4 + 20 * 0.01 + 0.1)
    assert estimate.last_token_s == pytest.approx(estimate.first_token_s + 10 * 0.2)


def test_another_tenants_flood_delays_nobody_by_more_than_a_share() -> None:
    backlog, forecast = foretelling()
    wait(backlog, "flood", 4, running=True)
    wait(backlog, "flood", 100, 30)
    (place,) = wait(backlog, "light", 1)
    estimate = forecast.estimate(place, num_prompt=20, max_tokens=None)

    assert estimate is not None
    assert estimate.first_token_s == pytest.approx(20 * 0.01 + 0.1)


def test_prompts_before_ones_own_take_time() -> None:
    backlog, forecast = foretelling(rows=100)
    wait(backlog, "a", 2, 50)
    (place,) = wait(backlog, "a", 1, 20)
    estimate = forecast.estimate(place, num_prompt=20, max_tokens=1)

    assert estimate is not None
    assert estimate.first_token_s == pytest.approx(100 * 0.01 + 20 * 0.01 + 0.1)
    assert estimate.last_token_s == estimate.first_token_s


def test_what_was_slow_under_load_is_not_held_against_who_comes_afterwards() -> None:
    backlog, forecast = foretelling()
    for _ in range(50):
        forecast.ended(since_first_token_s=60.0, num_output=11)
    wait(backlog, "a", 1, running=True)
    (place,) = wait(backlog, "a", 1)
    estimate = forecast.estimate(place, num_prompt=1, max_tokens=11)

    assert estimate is not None
    assert estimate.last_token_s < 1.5


def test_when_to_come_back_is_when_a_row_has_been_free() -> None:
    backlog, forecast = foretelling()
    wait(backlog, "a", 8)

    assert forecast.retry_s("a", 1.0) == pytest.approx(2.0 / 4)
    assert forecast.retry_s("b", 1.0) == pytest.approx(2.0 / 2)
    assert Forecast(backlog, StepTimes(), max_num_seqs=1000).retry_s("a", 1.0) >= SHORTEST_RETRY_S
