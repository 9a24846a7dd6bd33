"""When those who were refused are told to come again, and what is kept for them then."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gralora_runtime.intake.promises import EARLY_S, GRACE_S, LEAST_SHARE, LONGEST_S, MOST, SHORTEST_S, Promises

TURN_S = 0.2


def tell(
    promises: Promises, request_id: str, now_s: float = 0.0, *, tenant: str = "a", expected: bool = False
) -> float:
    return promises.tell(tenant, request_id, soonest_s=0.1, turn_s=TURN_S, is_expected=expected, now_s=now_s)


def test_each_is_told_a_turn_after_the_one_before_and_each_tenant_has_a_line_of_its_own() -> None:
    promises = Promises()

    assert [round(tell(promises, str(number)), 6) for number in range(4)] == [0.2, 0.4, 0.6, 0.8]
    assert round(tell(promises, "other", tenant="b"), 6) == 0.2
    assert promises.tell("c", "x", soonest_s=3.0, turn_s=TURN_S, is_expected=False, now_s=0.0) == 3.0
    assert promises.tell("d", "y", soonest_s=0.0, turn_s=0.0, is_expected=False, now_s=0.0) == SHORTEST_S


def test_somebody_is_expected_when_it_is_his_time_and_not_before_and_not_long_after() -> None:
    promises = Promises()
    due_s = {name: tell(promises, name) for name in ("early", "first", "last", "late")}

    assert not promises.came("a", "early", due_s["early"] - 2 * EARLY_S)
    assert promises.came("a", "early", due_s["early"])  # it had kept its time
    assert not promises.came("a", "early", due_s["early"])  # once
    assert promises.came("a", "first", due_s["first"] - EARLY_S / 2)
    assert promises.came("a", "last", due_s["last"] + GRACE_S / 2)
    assert not promises.came("a", "late", due_s["late"] + 2 * GRACE_S)
    assert not promises.came("a", "stranger", 0.0)


def test_a_time_is_its_tenants_alone() -> None:
    promises = Promises()
    due_s = tell(promises, "r", tenant="a")

    assert not promises.came("b", "r", due_s)
    assert promises.came("a", "r", due_s)


def test_room_is_kept_for_as_many_as_will_come_meanwhile() -> None:
    promises = Promises()
    assert promises.expected("a", 10.0, 0.0) == 0.0
    for number in range(20):
        tell(promises, str(number))  # 0.2, 0.4, ... 4.0

    assert promises.expected("a", 1.05, 0.0) == 5.0
    assert promises.expected("a", 1.05, 1.0) == 10.0  # five whose time has come, and five more
    assert promises.expected("b", 10.0, 0.0) == 0.0


def test_a_line_of_those_who_never_come_costs_next_to_nothing() -> None:
    promises = Promises()
    for number in range(100):
        tell(promises, str(number), now_s=0.0)
    told_early_s = tell(promises, "before")
    assert promises.expected("a", 100.0, 25.0 + GRACE_S) == 0.0  # they are forgotten
    assert promises.share == LEAST_SHARE
    for number in range(100):
        told_late_s = tell(promises, f"again-{number}", now_s=30.0)

    assert told_late_s < 0.1 * told_early_s
    assert promises.expected("a", 0.5, 30.0) <= LEAST_SHARE * 100


def test_once_people_come_again_their_times_are_kept_again() -> None:
    promises = Promises()
    promises.share = LEAST_SHARE
    for number in range(60):
        now_s = 10.0 * number
        assert promises.came("a", str(number), now_s + tell(promises, str(number), now_s=now_s))

    assert promises.share > 0.9


def test_who_came_in_time_and_found_no_room_waits_for_those_alone_whose_time_it_is() -> None:
    promises = Promises()
    due_s = [tell(promises, str(number)) for number in range(50)]
    assert promises.came("a", "0", due_s[0])

    again_s = tell(promises, "0", due_s[0], expected=True)
    assert round(again_s, 6) == TURN_S
    assert promises.came("a", "0", due_s[0] + again_s)


def test_what_is_too_far_away_is_not_promised_and_few_are_remembered() -> None:
    promises = Promises()
    assert promises.tell("a", "x", soonest_s=0.0, turn_s=1e9, is_expected=False, now_s=0.0) == LONGEST_S
    assert not promises.came("a", "x", LONGEST_S)
    for number in range(MOST + 10):
        promises.tell(str(number), str(number), soonest_s=1.0, turn_s=0.0, is_expected=False, now_s=0.0)

    assert not promises.came("0", "0", 1.0)
    assert promises.came(str(MOST + 9), str(MOST + 9), 1.0)


@given(
    st.lists(
        st.tuples(st.sampled_from(["tell", "came", "expected"]), st.integers(0, 5), st.booleans(), st.floats(0.0, 2.0)),
        max_size=60,
    )
)
def test_nothing_is_kept_of_those_that_came_or_are_late(acts: list[tuple[str, int, bool, float]]) -> None:
    promises, now_s = Promises(), 0.0
    open_until: dict[str, float] = {}
    for act, number, expected, passed_s in acts:
        now_s += passed_s
        request_id, tenant = str(number), f"tenant {number % 2}"
        if act == "tell":
            open_until[request_id] = now_s + tell(promises, request_id, now_s, tenant=tenant, expected=expected)
        elif act == "came" and promises.came(tenant, request_id, now_s):
            assert open_until.pop(request_id) >= now_s - GRACE_S
        else:
            assert promises.expected(tenant, 0.0, now_s) <= 3.0
    now_s += LONGEST_S + 2 * GRACE_S

    assert promises.expected("tenant 0", 1e6, now_s) == promises.expected("tenant 1", 1e6, now_s) == 0.0
