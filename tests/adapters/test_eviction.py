"""Who has to go: the answer of a few lines of brute force, on many random arenas."""

from __future__ import annotations

import random

import pytest

from gralora_runtime.adapters.residency.eviction import (
    HALF_LIFE,
    WORTHLESS,
    Segment,
    Window,
    choose_window,
    worth_after_use,
)


def segments(*pieces: tuple[str | None, int, int, bool]) -> list[Segment[str]]:
    """(owner or None, size, worth, usable) from the arena's start on. What is free is worth nothing."""
    found, offset = [], 0
    for owner, numel, worth, usable in pieces:
        known = WORTHLESS if owner is None else worth
        found.append(Segment(offset=offset, numel=numel, owner=owner, worth=known, usable=usable))
        offset += numel
    return found


def test_free_room_needs_no_victim() -> None:
    arena = segments(("a", 4, 1, True), (None, 4, 0, True), ("b", 4, 2, True))

    assert Window(offset=4, numel=3, victims=()) == choose_window(arena, 3, need_slot=False)


def test_who_is_worth_least_goes_first() -> None:
    arena = segments(("a", 4, 3, True), ("b", 4, 1, True), ("c", 4, 2, True))

    assert Window(offset=4, numel=4, victims=("b",)) == choose_window(arena, 4, need_slot=False)


def test_those_next_to_each_other_go_although_others_are_worth_less() -> None:
    """Evicting the two worth least, a and d, would leave two holes that are too small."""
    arena = segments(("a", 4, 1, True), ("b", 4, 8, True), ("c", 4, 5, True), ("d", 4, 2, True))

    assert Window(offset=8, numel=8, victims=("c", "d")) == choose_window(arena, 8, need_slot=False)


def test_free_room_counts_as_room() -> None:
    arena = segments(("a", 4, 5, True), (None, 4, 0, True), ("b", 4, 4, True), ("c", 8, 6, True))

    assert Window(offset=4, numel=8, victims=("b",)) == choose_window(arena, 8, need_slot=False)


def test_what_may_not_go_does_not_go() -> None:
    arena = segments(("a", 4, 1, False), ("b", 4, 9, True), ("c", 4, 2, False))

    assert Window(offset=4, numel=4, victims=("b",)) == choose_window(arena, 4, need_slot=False)
    assert choose_window(arena, 5, need_slot=False) is None


def test_without_a_free_slot_somebody_goes_although_there_is_room() -> None:
    arena = segments(("a", 4, 2, True), (None, 8, 0, True), ("b", 4, 1, True))

    assert Window(offset=4, numel=8, victims=("b",)) == choose_window(arena, 8, need_slot=True)


def test_without_a_free_slot_and_without_a_victim_there_is_no_room() -> None:
    arena = segments(("a", 4, 2, False), (None, 8, 0, True))

    assert choose_window(arena, 8, need_slot=True) is None


@pytest.mark.parametrize("seed", range(200))
def test_no_other_run_is_better(seed: int) -> None:
    rng = random.Random(seed)
    arena = segments(
        *(
            (None, rng.randint(1, 5), 0, rng.random() < 0.9)
            if rng.random() < 0.3
            else (str(i), rng.randint(1, 5), rng.randint(1, 9), rng.random() < 0.8)
            for i in range(rng.randint(0, 12))
        )
    )
    numel = rng.randint(1, 15)

    def cost(run: list[Segment[str]]) -> tuple[float, int]:
        owners = [segment for segment in run if segment.owner is not None]
        return max((segment.worth for segment in owners), default=WORTHLESS), len(owners)

    runs = [arena[i:j] for i in range(len(arena)) for j in range(i + 1, len(arena) + 1)]
    enough = [
        run for run in runs if all(segment.usable for segment in run) and sum(segment.numel for segment in run) >= numel
    ]
    window = choose_window(arena, numel, need_slot=False)

    if not enough:
        assert window is None
        return
    assert window is not None
    first = next(i for i, segment in enumerate(arena) if segment.offset == window.offset)
    last = next(j for j in range(first, len(arena) + 1) if sum(segment.numel for segment in arena[first:j]) >= numel)
    assert arena[first:last] in enough
    assert [segment.owner for segment in arena[first:last] if segment.owner] == list(window.victims)
    assert min(map(cost, enough)) == cost(arena[first:last])


def worth_of(*uses: int) -> float:
    worth = WORTHLESS
    for use in uses:
        worth = worth_after_use(worth, use)
    return worth


def test_of_those_used_equally_often_the_least_recently_used_is_worth_least() -> None:
    assert worth_of(1) < worth_of(2) < worth_of(3)
    assert worth_of(10, 20) < worth_of(11, 21)


def test_a_use_counts_half_as_much_a_half_life_later() -> None:
    first = worth_of(1)

    assert worth_of(1, 1) == pytest.approx(worth_of(1 + HALF_LIFE))
    assert worth_of(1, 1, 1, 1) == pytest.approx(worth_of(1 + 2 * HALF_LIFE))
    assert first == pytest.approx(worth_of(1 + HALF_LIFE) - 1)


def test_a_scan_does_not_throw_out_who_is_asked_for_again_and_again() -> None:
    favourite = worth_of(*range(10, 110, 10))

    assert all(favourite > worth_of(use) for use in range(101, 101 + HALF_LIFE))
    assert favourite < worth_of(101 + 5 * HALF_LIFE)


def test_a_server_that_runs_for_years_still_tells_uses_apart() -> None:
    late = 10**12

    assert worth_of(*range(1000), late) < worth_of(late + 1) < worth_of(late, late + 1)
