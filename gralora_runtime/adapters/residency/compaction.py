"""Chooses which adapters change places so that one more finds a run that is long enough. No torch.

The fewest moved elements would be a packing problem, and a lock is held meanwhile. So two kinds of plans are compared:
all in the way go into holes elsewhere, or all of a stretch are pushed together. The second kind always exists where
nobody is in use and the sizes add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from gralora_runtime.adapters.residency.eviction import WORTHLESS, Move, Owner, Segment, Window, with_slot

MAX_TRIES = 16  # windows whose adapters are tried in holes elsewhere; each looks at the whole arena

# What a plan costs: elements to move, then what the worthiest of its victims is worth.
Cost = tuple[int, float]


def choose_moves(segments: Sequence[Segment[Owner]], numel: int, *, need_slot: bool) -> Window[Owner] | None:
    """Room for `numel` elements by evicting `usable` owners and moving `movable` ones, with as little moved as found.

    Moves are to be made in the order given: none goes where somebody is who has not yet moved, but over itself.
    """
    if not any(segment.movable for segment in segments):
        return None
    pushed = min(_stretches(segments, numel), default=None)
    window = None
    for cost, offset, inside in islice(sorted(set(_windows(segments, numel))), MAX_TRIES):
        if pushed is not None and cost > pushed[0]:
            break
        window = _cleared(segments, range(offset, offset + numel), inside)
        if window is not None:
            break
    if window is None and pushed is not None:
        _, first, last = pushed
        window = _pushed_together(segments[first:last], numel)
    return with_slot(segments, window) if window is not None and need_slot else window


def _stretches(segments: Sequence[Segment[Owner]], numel: int) -> Iterator[tuple[Cost, int, int]]:
    """For each start the shortest stretch [first, last) without fixed owners whose usable ranges are large enough."""
    last, room, moved = 0, 0, 0
    for first, segment in enumerate(segments):
        if last <= first:
            last, room, moved = first, 0, 0
        while last < len(segments) and room < numel and not _is_fixed(segments[last]):
            room += segments[last].numel * segments[last].usable
            moved += segments[last].numel * segments[last].movable
            last += 1
        if segment.usable and room >= numel:
            yield (moved, _worth(segments[first:last])), first, last
        room -= segment.numel * segment.usable
        moved -= segment.numel * segment.movable


def _pushed_together(stretch: Sequence[Segment[Owner]], numel: int) -> Window[Owner]:
    """Whoever stays goes to the stretch's beginning, in order of place: each finds room behind the one before."""
    offset, moves = stretch[0].offset, []
    for segment in stretch:
        if segment.movable and segment.owner is not None:
            moves.append(Move(owner=segment.owner, offset=offset, numel=segment.numel))
            offset += segment.numel
    return Window(offset=offset, numel=numel, victims=_victims(stretch), moves=tuple(moves))


def _windows(segments: Sequence[Segment[Owner]], numel: int) -> Iterator[tuple[Cost, int, tuple[int, int]]]:
    """Runs of `numel` elements that touch no fixed owner, with the [first, last) of the segments that they touch.

    Each begins or ends where somebody ends or begins who stays: between such places the same ones are in the way. So
    at most one owner is partly outside.
    """
    for i in range(len(segments)):
        if i == 0 or not segments[i - 1].usable:
            yield from _window(segments, segments[i].offset, numel, i)
        if i + 1 == len(segments) or not segments[i + 1].usable:
            yield from _window(segments, segments[i].end - numel, numel, i)


def _window(
    segments: Sequence[Segment[Owner]], offset: int, numel: int, near: int
) -> Iterator[tuple[Cost, int, tuple[int, int]]]:
    """The window at `offset`, if there is one; it touches segment `near`."""
    end = offset + numel
    if offset < segments[0].offset or end > segments[-1].end:
        return
    first, last = near, near + 1
    while segments[first].offset > offset:
        first -= 1
    while segments[last - 1].end < end:
        last += 1
    inside = segments[first:last]
    if not any(_is_fixed(segment) for segment in inside):
        yield (sum(segment.numel for segment in inside if segment.movable), _worth(inside)), offset, (first, last)


def _cleared(segments: Sequence[Segment[Owner]], kept: range, inside: tuple[int, int]) -> Window[Owner] | None:
    """Everybody in the window finds a hole elsewhere: a free one, or else one that evicting makes."""
    movers = [segment for segment in segments[slice(*inside)] if segment.movable]
    for evicts in (False, True):
        usable = [s.usable and (evicts or s.owner is None) for s in segments]
        rooms = [s for i, s in enumerate(segments) if usable[i] or (s.movable and i in range(*inside))]
        moves = _put_into(_holes(rooms, kept), movers)
        if moves is not None:
            # Who is partly outside goes first: the others may be put where it was.
            moves.sort(key=lambda move: all(place in kept for place in (move[0].offset, move[0].end - 1)))
            return _with_moves(segments, kept, moves)
    return None


def _with_moves(
    segments: Sequence[Segment[Owner]], kept: range, moves: Sequence[tuple[Segment[Owner], int]]
) -> Window[Owner]:
    targets = [range(offset, offset + mover.numel) for mover, offset in moves]
    gone = [segment for segment in segments if any(_touches(segment, piece) for piece in (kept, *targets))]
    return Window(
        offset=kept.start,
        numel=len(kept),
        victims=_victims(gone),
        moves=tuple(
            Move(owner=mover.owner, offset=offset, numel=mover.numel)
            for mover, offset in moves
            if mover.owner is not None
        ),
    )


def _holes(rooms: Sequence[Segment[Owner]], kept: range) -> list[tuple[int, int]]:
    """(offset, end) of each longest run of these ranges outside of `kept`."""
    holes: list[tuple[int, int]] = []
    for room in rooms:
        for offset, end in ((room.offset, min(room.end, kept.start)), (max(room.offset, kept.stop), room.end)):
            if offset < end:
                begin = holes.pop()[0] if holes and holes[-1][1] == offset else offset
                holes.append((begin, end))
    return holes


def _put_into(
    holes: list[tuple[int, int]], movers: Sequence[Segment[Owner]]
) -> list[tuple[Segment[Owner], int]] | None:
    """Where each goes: the largest first, into the smallest hole that has room. None if one finds none."""
    places: list[tuple[Segment[Owner], int]] = []
    for mover in sorted(movers, key=lambda segment: -segment.numel):
        fitting = (i for i, (offset, end) in enumerate(holes) if end - offset >= mover.numel)
        i = min(fitting, key=lambda i: holes[i][1] - holes[i][0], default=None)
        if i is None:
            return None
        offset, end = holes[i]
        holes[i] = (offset + mover.numel, end)
        places.append((mover, offset))
    return places


def _victims(segments: Sequence[Segment[Owner]]) -> tuple[Owner, ...]:
    return tuple(segment.owner for segment in segments if segment.usable and segment.owner is not None)


def _is_fixed(segment: Segment[Owner]) -> bool:
    return not (segment.usable or segment.movable)


def _touches(segment: Segment[Owner], piece: range) -> bool:
    return segment.offset < piece.stop and piece.start < segment.end


def _worth(segments: Sequence[Segment[Owner]]) -> float:
    return max((segment.worth for segment in segments if segment.usable), default=WORTHLESS)
