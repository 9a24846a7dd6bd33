"""Chooses which idle adapters make room for a new one: least recently used, and next to each other. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    movable: bool = False  # its owner has to stay, but may stay elsewhere

    @property
    def end(self) -> int:
        return self.offset + self.numel

    @property
    def age(self) -> int:
        """Smaller is staler; nobody is the stalest."""
        return -1 if self.owner is None else self.last_used


@dataclass(frozen=True, slots=True, kw_only=True)
class Move(Generic[Owner]):
    """An owner whose range is to begin at `offset`. The new range may overlap the old one."""

    owner: Owner
    offset: int
    numel: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Window(Generic[Owner]):
    """Room for an adapter at `offset`, once the victims are gone and then, in their order, the moves are made."""

    offset: int
    numel: int
    victims: tuple[Owner, ...]
    moves: tuple[Move[Owner], ...] = ()

    @property
    def disturbed(self) -> tuple[Owner, ...]:
        """Who must not be in use."""
        return (*self.victims, *(move.owner for move in self.moves))

    @property
    def ranges(self) -> tuple[range, ...]:
        """What has to stay free for it."""
        own = range(self.offset, self.offset + self.numel)
        return (own, *(range(move.offset, move.offset + move.numel) for move in self.moves))


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
    window = Window(offset=segments[first].offset, numel=numel, victims=victims)
    return with_slot(segments, window) if need_slot else window


def with_slot(segments: Sequence[Segment[Owner]], window: Window[Owner]) -> Window[Owner] | None:
    """The window with at least one victim, since slots are given back by owners that go."""
    if window.victims:
        return window
    idle = (segment for segment in segments if segment.usable and segment.owner is not None)
    stalest = min(idle, key=lambda segment: segment.last_used, default=None)
    if stalest is None or stalest.owner is None:
        return None
    return replace(window, victims=(stalest.owner,))


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
            while latest and segments[latest[-1]].age <= segments[last].age:
                latest.pop()
            latest.append(last)
            last += 1
        if size < numel:
            break
        found.append(((segments[latest[0]].age, owners), first, last))
        size -= segments[first].numel
        owners -= segments[first].owner is not None
        if latest[0] == first:
            latest.popleft()
    return found
