"""Chooses which idle adapters make room for a new one: least recently used, and next to each other. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Owner = TypeVar("Owner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment(Generic[Owner]):
    """A range of the arena and who has it. `usable`: free, or its owner may be evicted."""

    offset: int
    numel: int
    owner: Owner | None  # None: a free range
    last_used: int  # of the owner; any clock that only grows
    usable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Window(Generic[Owner]):
    """Room for an adapter at `offset`, once the victims are gone."""

    offset: int
    numel: int
    victims: tuple[Owner, ...]


def choose_window(segments: Sequence[Segment[Owner]], numel: int, *, need_slot: bool) -> Window[Owner] | None:
    """The usable run of `numel` elements whose latest-used owner is the stalest; then the one with the fewest owners.

    An adapter is one range, so evicting by age alone would free holes that are too small and empty the whole pool.
    With `need_slot` at least one owner must go, even if a free range is large enough.
    """
    best: tuple[tuple[int, int], int, int] | None = None
    for run in _usable_runs(segments):
        for cost, first, last in _candidates(segments, run, numel):
            if best is None or cost < best[0]:
                best = (cost, first, last)
    if best is None:
        return None
    _, first, last = best
    victims = tuple(segment.owner for segment in segments[first:last] if segment.owner is not None)
    if need_slot and not victims:
        stalest = min(
            (segment for segment in segments if segment.usable and segment.owner is not None),
            key=lambda segment: segment.last_used,
            default=None,
        )
        if stalest is None or stalest.owner is None:
            return None
        victims = (stalest.owner,)
    return Window(offset=segments[first].offset, numel=numel, victims=victims)


def _usable_runs(segments: Sequence[Segment[Owner]]) -> list[tuple[int, int]]:
    """[first, last) of each longest run of usable segments."""
    runs: list[tuple[int, int]] = []
    first: int | None = None
    for i, segment in enumerate(segments):
        if segment.usable:
            first = i if first is None else first
        elif first is not None:
            runs.append((first, i))
            first = None
    return runs if first is None else [*runs, (first, len(segments))]


def _candidates(
    segments: Sequence[Segment[Owner]], run: tuple[int, int], numel: int
) -> list[tuple[tuple[int, int], int, int]]:
    """For each start in the run the shortest [first, last) that is large enough, as ((age, owners), first, last)."""
    found: list[tuple[tuple[int, int], int, int]] = []
    last, size, owners = run[0], 0, 0
    latest: deque[int] = deque()  # indices, their last_used falling: the first is the latest of the window
    for first in range(*run):
        while last < run[1] and size < numel:
            size += segments[last].numel
            owners += segments[last].owner is not None
            while latest and _age(segments[latest[-1]]) <= _age(segments[last]):
                latest.pop()
            latest.append(last)
            last += 1
        if size < numel:
            break
        found.append(((_age(segments[latest[0]]), owners), first, last))
        size -= segments[first].numel
        owners -= segments[first].owner is not None
        if latest[0] == first:
            latest.popleft()
    return found


def _age(segment: Segment[Owner]) -> int:
    return -1 if segment.owner is None else segment.last_used
