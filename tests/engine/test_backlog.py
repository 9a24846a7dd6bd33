"""How much may wait, of whom, and what is foretold of it."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gralora_runtime.adapters.residency.lease import BASE_LEASE
from gralora_runtime.intake.backlog import Backlog, Place
from gralora_runtime.intake.forecast import (
    MOST_CAUTION,
    RECENT_S,
    REMEMBERED,
    Estimate,
    Forecast,
)
from gralora_runtime.observation.step_times import StepTimes
from gralora_runtime.plan import AdapterUse, RowPlan, StepPlan
from gralora_runtime.request import GenerationRequest, Prompt, StoppingParams

BASE = AdapterUse(BASE_LEASE.slot, BASE_LEASE.generation, BASE_LEASE.width)


approx = partial(pytest.approx, rel=0.02)  # the line through the steps is a little too low


def ask(tenant: str = "a", **limits: int) -> GenerationRequest:
    return GenerationRequest(request_id="r", prompt=Prompt(text="x"), tenant=tenant, **limits)  # type: ignore[arg-type]


def fill(backlog: Backlog, tenant: str) -> int:
    """As many requests of a tenant as are let in."""
    count = 0
    while backlog.full_of_requests(ask(tenant), backlog.line(tenant, 1.0)) is None:
        backlog.enter(tenant, 1.0)
        count += 1
    return count


def test_one_tenant_leaves_room_for_others_and_each_next_one_too() -> None:
    backlog = Backlog(max_requests=1000, max_tokens=1 << 20)

    assert fill(backlog, "flood") == 800
    assert fill(backlog, "second") == 160
    assert fill(backlog, "third") == 32


def test_all_together_are_never_too_many() -> None:
    backlog = Backlog(max_requests=10, max_tokens=1 << 20)
    let_in = sum(fill(backlog, str(index)) for index in range(20))

    assert let_in == backlog.requests == 10
    assert backlog.full_of_requests(ask("late"), backlog.line("late", 1.0)) == "10 requests are under way"


def test_a_tenants_own_limits_hold() -> None:
    backlog = Backlog(max_requests=100, max_tokens=1 << 20)
    places = [backlog.enter("a", 1.0) for _ in range(3)]
    line = places[0].line

    full = backlog.full_of_requests(ask(max_queued_requests=3), line)
    assert full == "3 requests of this tenant are waiting, its limit queued_requests is 3"
    backlog.start(places[0])
    assert backlog.full_of_requests(ask(max_queued_requests=3), line) is None
    backlog.count(places[1], 80)
    full = backlog.full_of_tokens(ask(max_queued_tokens=100), places[2], 21)
    assert full == "prompts of 80 tokens of this tenant are waiting, its limit queued_tokens is 100"
    assert backlog.full_of_tokens(ask(max_queued_tokens=100), places[2], 20) is None


def test_a_prompt_that_is_alone_is_never_too_long_and_a_second_one_is() -> None:
    backlog = Backlog(max_requests=100, max_tokens=50)
    first, second = backlog.enter("a", 1.0), backlog.enter("b", 1.0)

    assert backlog.full_of_tokens(ask(max_queued_tokens=10), first, 60) is None
    backlog.count(first, 60)
    assert backlog.full_of_tokens(ask("b"), second, 1) == "prompts of 60 tokens are waiting"
    backlog.start(first)
    assert backlog.full_of_tokens(ask("b"), second, 1) is None


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
    """Of a server whose steps take 0.1 s, a prompt's token 0.01, and whose answers have 10 tokens of 20."""
    backlog, steps = Backlog(max_requests=10_000, max_tokens=1 << 20), StepTimes()
    for _ in range(50):
        steps.observe(step(0, 4), 0.1)
        steps.observe(step(0, 1), 0.1)
        steps.observe(step(50, 4), 0.6)
    forecast = Forecast(backlog, steps, max_num_seqs=rows, max_num_batched_tokens=100)
    forecast.learn("somebody", num_output=10, max_tokens=20, whole=True)
    return backlog, forecast


def wait(backlog: Backlog, tenant: str, count: int, tokens: int = 0, *, running: bool = False) -> list[Place]:
    places = [backlog.enter(tenant, 1.0) for _ in range(count)]
    for place in places:
        backlog.count(place, tokens)
        if running:
            backlog.start(place)
    return places


PROMPT_TOKEN_S = 0.01 + 0.1 / 100  # its own part of a step, and its part of what each step takes
ANY, EXACTLY_6 = StoppingParams(), StoppingParams(max_tokens=6, ignore_eos=True)


def test_steps_tell_what_rows_and_prompts_take() -> None:
    steps = StepTimes()
    unknown = steps.cost()
    for rows in (1, 4, 16, 32):
        for tokens in (0, 7, 64, 200):
            steps.observe(step(tokens, rows), 0.05 + 0.001 * rows + 0.002 * tokens)
    cost = steps.cost()

    assert unknown is None
    assert cost is not None
    assert cost.step_s == approx(0.05)
    assert cost.row_s == approx(0.001)
    assert cost.prompt_token_s == approx(0.002)


def test_steps_of_one_kind_are_foretold_and_none_is_shorter_by_more_work() -> None:
    steps = StepTimes()
    for _ in range(100):
        steps.observe(step(0, 8), 0.2)
    alike = steps.cost()
    for tokens in (10, 100):
        steps.observe(step(tokens, 8), 0.1)
    odd = steps.cost()

    assert alike.step_s + 8 * alike.row_s == approx(0.2)
    assert min(odd.step_s, odd.row_s, odd.prompt_token_s) >= 0.0


def test_forecasts_that_were_too_rosy_make_the_next_ones_more_cautious_and_right_ones_less() -> None:
    backlog, forecast = foretelling()
    (_, place) = wait(backlog, "a", 2)

    def told() -> Estimate:
        estimate = forecast.estimate(place, EXACTLY_6, num_prompt=20, now_s=0.0)
        assert estimate is not None
        return estimate

    first = told()
    for _ in range(10):
        forecast.compare(told(), 10.0, ended=True)
    cautious = told()
    for _ in range(100):
        forecast.compare(told(), 10.0, ended=False)
    most = told()
    for _ in range(400):
        forecast.compare(told(), 0.01, ended=True)

    assert (first.caution, most.caution) == (1.0, MOST_CAUTION)
    assert cautious.caution == approx(1.9)
    assert cautious.last_token_s == approx(1.9 * first.last_token_s)
    assert told() == first


def test_once_somebody_is_alone_what_made_forecasts_cautious_is_over() -> None:
    """Or whoever is refused for caution would be refused for ever, as only those that are let in can lessen it."""
    backlog, forecast = foretelling()
    first, place = wait(backlog, "a", 2)
    before = forecast.estimate(place, EXACTLY_6, num_prompt=20, now_s=0.0)
    assert before is not None
    for _ in range(100):
        forecast.compare(before, 10.0, ended=False)
    backlog.leave(first)
    alone = forecast.estimate(place, EXACTLY_6, num_prompt=20, now_s=0.0)
    wait(backlog, "a", 1)

    assert alone is None
    assert forecast.estimate(place, EXACTLY_6, num_prompt=20, now_s=0.0) == before


def test_nothing_is_foretold_of_who_is_alone_or_before_anything_was_seen() -> None:
    backlog, forecast = foretelling()
    (alone,) = wait(backlog, "a", 1)
    unknown = Forecast(backlog, StepTimes(), max_num_seqs=4, max_num_batched_tokens=100)

    assert forecast.estimate(alone, ANY, num_prompt=10, now_s=0.0) is None
    wait(backlog, "b", 1)
    assert forecast.estimate(alone, ANY, num_prompt=10, now_s=0.0) is not None
    assert unknown.estimate(alone, ANY, num_prompt=10, now_s=0.0) is None


def test_where_there_are_rows_only_the_prompt_takes_time() -> None:
    backlog, forecast = foretelling()
    wait(backlog, "a", 3, running=True)
    (place,) = wait(backlog, "a", 1)
    estimate = forecast.estimate(place, EXACTLY_6, num_prompt=20, now_s=0.0)

    assert estimate is not None
    assert estimate.first_token_s == approx(20 * PROMPT_TOKEN_S + 0.1)
    assert estimate.last_token_s == approx(20 * PROMPT_TOKEN_S + 0.1 + 5 * 0.1)


def test_whose_rows_are_taken_waits_for_as_many_to_end() -> None:
    backlog, forecast = foretelling()
    wait(backlog, "a", 4, running=True)
    wait(backlog, "a", 7)
    (place,) = wait(backlog, "a", 1)
    estimate = forecast.estimate(place, ANY, num_prompt=20, now_s=0.0)

    assert estimate is not None
    assert estimate.first_token_s == approx(8 * (10 * 0.1) / 4 + 20 * PROMPT_TOKEN_S + 0.1)
    assert estimate.last_token_s == approx(estimate.first_token_s + 9 * 0.1)


def test_another_tenants_flood_delays_nobody_by_more_than_a_share() -> None:
    backlog, forecast = foretelling()
    wait(backlog, "flood", 4, running=True)
    wait(backlog, "flood", 100, 30)
    (place,) = wait(backlog, "light", 1)
    estimate = forecast.estimate(place, ANY, num_prompt=20, now_s=0.0)

    assert estimate is not None
    assert estimate.first_token_s == approx(20 * PROMPT_TOKEN_S + 0.1)


def test_prompts_before_ones_own_take_time() -> None:
    backlog, forecast = foretelling(rows=100)
    wait(backlog, "a", 2, 50)
    (place,) = wait(backlog, "a", 1, 20)
    estimate = forecast.estimate(place, StoppingParams(max_tokens=1), num_prompt=20, now_s=0.0)

    assert estimate is not None
    assert estimate.first_token_s == approx(100 * PROMPT_TOKEN_S + 20 * PROMPT_TOKEN_S + 0.1)
    assert estimate.last_token_s == estimate.first_token_s


def outputs_of(forecast: Forecast, backlog: Backlog, tenant: str, stopping: StoppingParams) -> float:
    """How many tokens an answer is thought to have."""
    (place,) = wait(backlog, tenant, 1)
    estimate = forecast.estimate(place, stopping, num_prompt=0, now_s=0.0)
    backlog.leave(place)
    assert estimate is not None
    return 1 + (estimate.last_token_s - estimate.first_token_s) / 0.1


def test_each_tenants_answers_have_their_own_length_and_a_new_ones_those_of_all() -> None:
    backlog, forecast = foretelling()
    wait(backlog, "other", 1, running=True)
    for _ in range(100):
        forecast.learn("long", num_output=200, max_tokens=200, whole=True)
        forecast.learn("short", num_output=4, max_tokens=400, whole=True)

    assert outputs_of(forecast, backlog, "long", ANY) == approx(200)
    assert outputs_of(forecast, backlog, "short", StoppingParams(max_tokens=400)) == approx(4)
    assert outputs_of(forecast, backlog, "short", StoppingParams(max_tokens=2)) == approx(2)
    assert outputs_of(forecast, backlog, "short", StoppingParams(max_tokens=99, ignore_eos=True)) == approx(99)
    assert 30 < outputs_of(forecast, backlog, "new", StoppingParams(max_tokens=100)) < 70


def test_who_ran_out_of_time_might_have_had_more() -> None:
    backlog, forecast = foretelling()
    wait(backlog, "other", 1, running=True)
    forecast.learn("a", num_output=50, max_tokens=100, whole=True)
    for _ in range(50):
        forecast.learn("a", num_output=3, max_tokens=100, whole=False)
    unmoved = outputs_of(forecast, backlog, "a", ANY)
    for _ in range(50):
        forecast.learn("a", num_output=80, max_tokens=100, whole=False)

    assert unmoved == approx(50)
    assert outputs_of(forecast, backlog, "a", ANY) > 75


def test_prompts_that_are_taken_on_delay_the_answers_of_those_that_decode() -> None:
    backlog, forecast = foretelling()
    (_, place) = wait(backlog, "a", 2)

    def between_tokens_s(now_s: float) -> float:
        estimate = forecast.estimate(place, EXACTLY_6, num_prompt=0, now_s=now_s)
        assert estimate is not None
        return (estimate.last_token_s - estimate.first_token_s) / 5

    quiet_s = between_tokens_s(0.0)
    forecast.take_on(100, 0.0)  # half of two seconds
    busy_s = between_tokens_s(0.0)
    forecast.take_on(10_000, 0.0)
    full_s = between_tokens_s(0.0)
    wait(backlog, "flood", 8)
    beside_crowd_s = between_tokens_s(0.0)

    assert (quiet_s, busy_s) == approx((0.1, 0.2))
    assert full_s == approx(0.1 + 100 * 0.01)  # no step is longer
    assert beside_crowd_s == approx(0.1 + 25 * 0.01)
    assert between_tokens_s(20 * RECENT_S) == approx(quiet_s)


def test_a_turn_lasts_as_long_as_between_two_that_were_let_in_by_the_tenants_weights() -> None:
    backlog, forecast = foretelling()
    places = wait(backlog, "a", 8)
    line = places[0].line

    assert forecast.turn_s(line, 0.0) == approx(0.25)  # nobody was: a row is free every 10 * 0.1 / 4 s
    for number in range(1000):
        forecast.take_on(1, number / 10)
    assert forecast.turn_s(line, 100.0) == approx(0.1)
    backlog.enter("b", 3.0)
    assert forecast.turn_s(line, 100.0) == approx(0.4)
    assert forecast.turn_s(line, 1000.0) == approx(1 / 3)  # the other tenant has one request: three rows are left


def test_those_who_are_to_come_are_counted_as_if_they_were_there() -> None:
    backlog, forecast = foretelling()
    (place,) = wait(backlog, "a", 1)
    wait(backlog, "b", 1)
    alone, among = (
        forecast.estimate(place, EXACTLY_6, num_prompt=0, now_s=0.0, others=others) for others in (0.0, 12.0)
    )

    assert alone is not None
    assert among is not None
    assert among.first_token_s > alone.first_token_s + 1.0


def test_the_lengths_of_few_tenants_are_remembered() -> None:
    _, forecast = foretelling()
    for number in range(REMEMBERED + 50):
        forecast.learn(str(number), num_output=1, max_tokens=1, whole=True)

    assert len(forecast._of_tenants) == REMEMBERED
