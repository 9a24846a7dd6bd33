"""Rates are of the time between two looks, if that is worth something."""

from __future__ import annotations

from gralora_server.live.rates import MAX_S, Rates


def test_a_rate_is_the_growth_over_the_time_and_stays_until_there_is_a_better_one() -> None:
    rates = Rates()

    assert rates.look({"a": 10}, 100.0) == {}
    assert rates.look({"a": 30, "new": 5}, 110.0) == {"a": 2.0}
    assert rates.look({"a": 99, "new": 5}, 111.0) == {"a": 2.0}
    assert rates.look({"a": 30, "new": 25}, 120.0) == {"a": 0.0, "new": 2.0}


def test_an_old_look_says_nothing_of_now() -> None:
    rates = Rates()
    rates.look({"a": 10}, 100.0)

    assert rates.look({"a": 30}, 101.0 + MAX_S) == {}
