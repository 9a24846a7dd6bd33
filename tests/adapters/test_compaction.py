"""Who changes places for one more adapter: plans are carried out over an allocator, and small ones tried otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from gralora_kernels.alignment import ALIGNMENT
from gralora_runtime.adapters.residency.arena import ArenaAllocator
from gralora_runtime.adapters.residency.compaction import choose_moves
from gralora_runtime.adapters.residency.eviction import WORTHLESS, Move, Segment, Window

Arena = list[Segment[str]]
FREE, IDLE, PINNED, LEASED = "free", "idle", "pinned", "leased"


def arena_of(*pieces: tuple[str, int]) -> Arena:
    """(kind, size) from the arena's start on. Owners are named by their position, and worth that much."""
    found: Arena = []
    for i, (kind, numel) in enumerate(pieces):
        found.append(
            Segment(
                offset=found[-1].end if found else 0,
                numel=numel,
                owner=None if kind == FREE else str(i),
                worth=WORTHLESS if kind == FREE else i,
                usable=kind in (FREE, IDLE),
                movable=kind == PINNED,
            )
        )
    return found


def to(owner: str, offset: int, numel: int) -> Move[str]:
    return Move(owner=owner, offset=offset, numel=numel)


def choose(arena: Arena, numel: int, *, need_slot: bool = False) -> Window[str] | None:
    return choose_moves(arena, numel, need_slot=need_slot)


def moved_by(window: Window[str]) -> int:
    return sum(move.numel for move in window.moves)


def test_one_between_two_free_ranges_goes_to_their_edge() -> None:
    arena = arena_of((FREE, 2), (PINNED, 4), (FREE, 2))

    window = choose(arena, 4)

    assert Window(offset=0, numel=4, victims=(), moves=(to("1", 4, 4),)) == window


def test_it_goes_where_nobody_has_to_leave_for_it() -> None:
    arena = arena_of((LEASED, 1), (FREE, 2), (PINNED, 2), (LEASED, 1), (IDLE, 2), (LEASED, 1), (FREE, 2), (LEASED, 1))

    assert Window(offset=1, numel=4, victims=(), moves=(to("2", 9, 2),)) == choose(arena, 4)


def test_somebody_idle_makes_room_for_it_if_nothing_is_free() -> None:
    arena = arena_of((LEASED, 1), (FREE, 2), (PINNED, 2), (LEASED, 1), (IDLE, 3), (LEASED, 1))

    assert Window(offset=1, numel=4, victims=("4",), moves=(to("2", 6, 2),)) == choose(arena, 4)


def test_the_smaller_one_moves() -> None:
    arena = arena_of((FREE, 3), (PINNED, 2), (FREE, 3), (PINNED, 1), (FREE, 3))

    window = choose(arena, 6)

    assert window is not None
    assert [move.owner for move in window.moves] == ["3"]


def test_of_two_that_are_as_large_the_one_beside_those_worth_least_moves() -> None:
    arena = arena_of((IDLE, 2), (PINNED, 2), (IDLE, 2), (LEASED, 1), (IDLE, 2), (PINNED, 2), (IDLE, 2))

    assert Window(offset=0, numel=4, victims=("0", "2"), moves=(to("1", 4, 2),)) == choose(arena, 4)


def test_all_of_a_stretch_are_pushed_together_where_no_hole_has_room() -> None:
    arena = arena_of((FREE, 1), (PINNED, 2), (FREE, 1), (PINNED, 2), (FREE, 1))

    assert Window(offset=4, numel=3, victims=(), moves=(to("1", 0, 2), to("3", 2, 2))) == choose(arena, 3)


def test_nobody_moves_where_nobody_may() -> None:
    assert choose(arena_of((FREE, 2), (LEASED, 2), (FREE, 2)), 4) is None
    assert choose(arena_of((FREE, 2), (PINNED, 2), (LEASED, 2), (FREE, 1)), 4) is None


def test_without_a_free_slot_somebody_has_to_go() -> None:
    arena = [(FREE, 2), (PINNED, 2), (FREE, 2), (LEASED, 2), (IDLE, 1)]

    window = choose(arena_of(*arena), 4, need_slot=True)
    assert window is not None
    assert window.victims == ("4",)
    assert choose(arena_of(*arena[:-1]), 4, need_slot=True) is None


def layouts(*kinds: str, most: int, size: int) -> st.SearchStrategy[Arena]:
    piece = st.tuples(st.sampled_from(kinds), st.integers(1, size))
    return st.lists(piece, min_size=1, max_size=most).map(lambda pieces: arena_of(*pieces))


def carry_out(arena: Arena, window: Window[str]) -> None:
    """As the mover does; the allocator asserts that what is taken was free."""
    ranges = ArenaAllocator(arena[-1].end * ALIGNMENT)
    places = {segment.owner: segment for segment in arena if segment.owner is not None}
    for segment in places.values():
        ranges.allocate_at(segment.offset * ALIGNMENT, segment.numel * ALIGNMENT)
    for victim in window.victims:
        assert places[victim].usable
        ranges.free(places[victim].offset * ALIGNMENT)
    for move in window.moves:
        assert places[move.owner].movable
        assert places[move.owner].numel == move.numel
        ranges.free(places[move.owner].offset * ALIGNMENT)
        ranges.allocate_at(move.offset * ALIGNMENT, move.numel * ALIGNMENT)
        ranges.check_integrity()
    ranges.allocate_at(window.offset * ALIGNMENT, window.numel * ALIGNMENT)
    ranges.check_integrity()


@settings(max_examples=500, deadline=None)
@given(layouts(FREE, IDLE, PINNED, PINNED, LEASED, most=14, size=5), st.integers(1, 16), st.booleans())
def test_a_plan_can_be_carried_out_and_frees_what_it_promises(arena: Arena, numel: int, need_slot: bool) -> None:
    window = choose(arena, numel, need_slot=need_slot)

    if window is None:
        return
    assert window.numel == numel
    assert window.victims or not need_slot
    assert len(set(window.disturbed)) == len(window.disturbed)
    carry_out(arena, window)


@settings(max_examples=300, deadline=None)
@given(layouts(FREE, IDLE, PINNED, most=14, size=5), st.integers(1, 40))
def test_where_nobody_is_in_use_there_is_a_plan_if_the_sizes_add_up(arena: Arena, numel: int) -> None:
    pinned = [segment.numel for segment in arena if segment.movable]

    window = choose(arena, numel)

    assert (window is not None) == (bool(pinned) and sum(pinned) + numel <= arena[-1].end)


@settings(max_examples=200, deadline=None)
@given(layouts(FREE, IDLE, PINNED, LEASED, most=7, size=3), st.integers(1, 6))
def test_where_moving_one_would_do_no_more_is_moved(arena: Arena, numel: int) -> None:
    """Against every way to put everybody anywhere."""
    if sum(segment.movable for segment in arena) not in (1, 2, 3):
        return
    ways = sorted((sum(moved), len(moved)) for moved in all_ways(arena, numel))

    window = choose(arena, numel)

    assert window is None or ways
    if ways and window is not None:
        assert moved_by(window) >= ways[0][0]
    if ways and ways[0][1] <= 1:
        assert window is not None
        assert moved_by(window) == ways[0][0]


def all_ways(arena: Arena, numel: int) -> Iterator[Sequence[int]]:
    """Sizes of those that are somewhere else, for each final order in which a run is free."""
    total = arena[-1].end
    movers = [segment for segment in arena if segment.movable]
    fixed = {cell for s in arena if not (s.usable or s.movable) for cell in range(s.offset, s.end)}
    for offsets in product(*(range(total - mover.numel + 1) for mover in movers)):
        cells = [cell for offset, m in zip(offsets, movers, strict=True) for cell in range(offset, offset + m.numel)]
        taken = fixed.union(cells)
        if len(taken) != len(fixed) + len(cells):
            continue
        if any(taken.isdisjoint(range(start, start + numel)) for start in range(total - numel + 1)):
            yield [m.numel for m, offset in zip(movers, offsets, strict=True) if offset != m.offset]
