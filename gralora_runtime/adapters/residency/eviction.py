"""Chooses which idle adapters make room for a new one: worth least by their uses, and next to each other. No torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

Owner = TypeVar("Owner")

# Uses, of all adapters together, after which a use counts half. 50 is little better than the least recently used; with
# 200 favourites of yesterday stay for too long (`python -m benchmarks.eviction`, and its notes).
HALF_LIFE = 100
WORTHLESS = -math.inf  # never used, or free


def worth_after_use(worth: float, use: int) -> float:
    """What an owner is worth once it was used, by a count of all uses: its own uses, lately ones counting more.

    As a logarithm of what that would be at the count's beginning: so it stays right while others are used.
    """
    return use / HALF_LIFE + math.log2(1 + 2 ** (worth - use / HALF_LIFE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment(Generic[Owner]):
    """A range of the arena and who has it. `usable`: free, or its owner may be evicted."""

    offset: int
    numel: int
    owner: Owner | None  # None: a free range
    worth: float  # of the owner: the least goes first
    usable: bool
    movable: bool = False  # its owner has to stay, but may stay elsewhere

    @property
    def end(self) -> int:
        return self.offset + self.numel


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
    """The usable run of `numel` elements whose worthiest owner is worth least; then the one with the fewest owners.

    An adapter is one range, so evicting by worth alone would free holes that are too small and empty the whole pool.
    With `need_slot` at least one owner must go, even if a free range is large enough.
    """
    best: tuple[tuple[float, int], int, int] | None = None
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
    least = min(idle, key=lambda segment: segment.worth, default=None)
    if least is None or least.owner is None:
        return None
    return replace(window, victims=(least.owner,))


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
) -> list[tuple[tuple[float, int], int, int]]:
    """For each start in the run the shortest [first, last) that is large enough, as ((worth, owners), first, last)."""
    found: list[tuple[tuple[float, int], int, int]] = []
    last, size, owners = run[0], 0, 0
    best: deque[int] = deque()  # indices, their worth falling: the first is the worthiest of the window
    for first in range(*run):
        while last < run[1] and size < numel:
            size += segments[last].numel
            owners += segments[last].owner is not None
            while best and segments[best[-1]].worth <= segments[last].worth:
                best.pop()
            best.append(last)
            last += 1
        if size < numel:
            break
        found.append(((segments[best[0]].worth, owners), first, last))
        size -= segments[first].numel
        owners -= segments[first].owner is not None
        if best[0] == first:
            best.popleft()
    return found
