"""Ranges of the arena: random walks against a bitmap that cannot be wrong."""

from __future__ import annotations

import random

import pytest

from gralora_runtime.adapters.residency.arena import ArenaAllocator


def test_ranges_begin_at_the_alignment_and_round_up_to_it() -> None:
    arena = ArenaAllocator(100)

    assert arena.numel == 96
    assert arena.allocate(1) == 0
    assert arena.allocate(17) == 16
    assert arena.free_numel == 48


def test_the_first_range_that_is_large_enough_is_taken() -> None:
    arena = ArenaAllocator(16 * 10)
    offsets = [arena.allocate(32) for _ in range(5)]
    assert offsets == [0, 32, 64, 96, 128]
    assert arena.allocate(1) is None
    arena.free(32)
    arena.free(96)

    assert arena.allocate(16) == 32
    assert arena.allocate(32) == 96


def test_freed_neighbours_become_one_range() -> None:
    arena = ArenaAllocator(16 * 4)
    for _ in range(4):
        arena.allocate(16)
    for offset in (0, 32, 16, 48):
        arena.free(offset)
        arena.check_integrity()

    assert list(arena.free_ranges()) == [(0, 64)]


def test_nothing_is_freed_twice() -> None:
    arena = ArenaAllocator(64)
    arena.allocate(16)
    arena.free(0)

    with pytest.raises(AssertionError):
        arena.free(0)


@pytest.mark.parametrize("offset", [0, 16, 32])
def test_a_taken_range_is_not_given_again(offset: int) -> None:
    arena = ArenaAllocator(64)
    arena.allocate_at(16, 16)

    if offset == 32:
        arena.allocate_at(offset, 32)
    else:
        with pytest.raises(AssertionError):
            arena.allocate_at(offset, 32)


def test_an_empty_arena_has_room_for_nothing() -> None:
    arena = ArenaAllocator(15)
    arena.check_integrity()

    assert arena.allocate(1) is None


@pytest.mark.parametrize("seed", range(20))
def test_random_walks_keep_the_books(seed: int) -> None:
    """Allocations, by first fit and by address, and frees in any order, against one flag per 16 elements."""
    rng = random.Random(seed)
    cells = rng.choice([1, 7, 64])
    arena, taken, owned = ArenaAllocator(cells * 16), [False] * cells, {}
    for _ in range(300):
        if owned and rng.random() < 0.5:
            offset = rng.choice(list(owned))
            numel = owned.pop(offset)
            assert numel == arena.free(offset)
            for cell in range(offset // 16, (offset + numel) // 16):
                taken[cell] = False
        else:
            size = rng.randint(1, max(1, cells // 3))
            fits = [i for i in range(cells - size + 1) if not any(taken[i : i + size])]
            if fits and rng.random() < 0.3:
                start = rng.choice(fits)
                arena.allocate_at(start * 16, size * 16 - rng.randint(0, 15))
            else:
                offset_or_none = arena.allocate(size * 16)
                assert (fits[0] * 16 if fits else None) == offset_or_none
                if offset_or_none is None:
                    continue
                start = offset_or_none // 16
            owned[start * 16] = size * 16
            taken[start : start + size] = [True] * size
        arena.check_integrity()
        assert 16 * taken.count(False) == arena.free_numel
