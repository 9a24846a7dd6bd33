"""Who waits for room in the pool, and which adapters make it. First come, first served; decides, but moves no memory.

When the first in line finds no idle room, the adapters that would make it get no new leases until it has moved in, so
it waits for requests that are already running and for no others. Those behind it may use any room but that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice

from gralora_runtime.adapters.catalogue.store import AdapterVersion
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter
from gralora_runtime.adapters.residency.eviction import Window, choose_window
from gralora_runtime.adapters.residency.pool import AdapterPool, Resident

# How many adapters behind a waiting one are tried per change in the pool: bounds the search, which holds a lock.
LOOKAHEAD = 4


@dataclass(slots=True, eq=False, kw_only=True)
class Placement:
    """One content that waits, for all names that want it."""

    digest: str
    numel: int
    adapter: LoadedAdapter | None  # None: the weights are still in the pool, on their way out
    versions: list[AdapterVersion] = field(default_factory=list)
    moving: bool = False


class PlacementQueue:
    """Placements in order of arrival, and the room kept for the first one."""

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self._waiting: dict[str, Placement] = {}  # by digest, in order of arrival
        self._drain: tuple[Placement, Window[Resident]] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Placement]:
        return iter(tuple(self._waiting.values()))

    def find(self, digest: str) -> Placement | None:
        return self._waiting.get(digest)

    def add(self, placement: Placement) -> None:
        """Weights that are still in the pool come from there: two stays of one content would be one too many."""
        if self._pool.find(placement.digest) is not None:
            placement.adapter = None
        self._waiting[placement.digest] = placement

    def remove(self, placement: Placement) -> None:
        del self._waiting[placement.digest]
        if self._drain is not None and self._drain[0] is placement:
            self._stop_draining()

    def possible(self, numel: int) -> bool:
        """Whether an adapter of this size would fit if every lease ended now: only pinned ones are in the way."""
        if not any(resident.pinned for resident in self._pool.residents()):
            return numel <= self._pool.ranges.numel
        return self._window(numel, self._not_pinned()) is not None

    def pick(self) -> tuple[Placement, Window[Resident]] | None:
        """The next adapter that can move in, and where; its victims are marked as leaving."""
        ready = (placement for placement in self._waiting.values() if placement.adapter is not None)
        for position, placement in enumerate(islice(ready, 1 + LOOKAHEAD)):
            window = self._idle_room(placement, is_first=position == 0)
            if window is not None:
                placement.moving = True
                for victim in window.victims:
                    victim.leaving = True
                return placement, window
            if position == 0:
                self._start_draining(placement)
        return None

    def _idle_room(self, placement: Placement, *, is_first: bool) -> Window[Resident] | None:
        kept = range(0)
        if self._drain is not None and not is_first:
            window = self._drain[1]
            kept = range(window.offset, window.offset + window.numel)
        idle = {r for r in self._pool.residents() if r.idle and (is_first or not r.draining)}
        return self._window(placement.numel, idle, kept)

    def _start_draining(self, placement: Placement) -> None:
        if self._drain is not None:
            of, window = self._drain
            if of is placement and not any(victim.pinned for victim in window.victims):
                return
            self._stop_draining()
        chosen = self._window(placement.numel, self._not_pinned())
        if chosen is not None:
            self._drain = (placement, chosen)
            for victim in chosen.victims:
                victim.draining = True

    def _stop_draining(self) -> None:
        assert self._drain is not None
        for victim in self._drain[1].victims:
            victim.draining = False
        self._drain = None

    def _not_pinned(self) -> set[Resident]:
        return {resident for resident in self._pool.residents() if not resident.pinned}

    def _window(self, numel: int, usable: Collection[Resident], kept: range = range(0)) -> Window[Resident] | None:
        segments = self._pool.segments(usable, kept)
        return choose_window(segments, numel, need_slot=self._pool.num_free_slots == 0)
