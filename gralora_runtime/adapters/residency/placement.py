"""Who waits for room in the pool, and which adapters make it. First come, first served; decides, but moves no memory.

When the first in line finds no idle room, the adapters that would make it get no new leases until it has moved in, so
it waits for requests that are already running and for no others. Those behind it may use any room but that. Pinned
adapters stay in the pool, but for the first in line they change places.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from gralora_runtime.adapters.catalogue.store import AdapterVersion
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter
from gralora_runtime.adapters.residency.compaction import choose_moves
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
        """Whether an adapter of this size would fit if every lease ended now: pinned ones stay, wherever."""
        pinned = [resident.layout.numel for resident in self._pool.residents() if resident.pinned]
        return len(pinned) < self._pool.max_slots and sum(pinned) + numel <= self._pool.ranges.numel

    def pick(self) -> tuple[Placement, Window[Resident]] | None:
        """The next adapter that can move in, and where; whoever has to go or to move is marked as leaving."""
        ready = (placement for placement in self._waiting.values() if placement.adapter is not None)
        for position, placement in enumerate(islice(ready, 1 + LOOKAHEAD)):
            is_first = position == 0
            if is_first and self._drain is not None and self._drain[0] is not placement:
                self._stop_draining()
            window = self._room_of_first(placement) if is_first else self._room_behind(placement)
            if window is not None:
                placement.moving = True
                for resident in window.disturbed:
                    resident.leaving = True
                return placement, window
            if is_first:
                self._start_draining(placement)
        return None

    def _room_of_first(self, placement: Placement) -> Window[Resident] | None:
        """Idle adapters leave or, where that makes no room, change places."""
        still = [resident for resident in self._pool.residents() if resident.still]
        window = self._window(placement.numel, {resident for resident in still if resident.idle})
        return window or self._kept_moves() or self._moves(placement.numel, still)

    def _kept_moves(self) -> Window[Resident] | None:
        """The moves that were waited for, if everybody whom they concern is idle now.

        With others in use than before, planning anew might find no others.
        """
        window = self._drain[1] if self._drain is not None else None
        if window is None or not window.moves or not self._stands(window):
            return None
        return window if all(resident.still for resident in window.disturbed) else None

    def _room_behind(self, placement: Placement) -> Window[Resident] | None:
        kept = self._drain[1].ranges if self._drain is not None else ()
        idle = {resident for resident in self._pool.residents() if resident.idle and not resident.draining}
        return self._window(placement.numel, idle, kept)

    def _start_draining(self, placement: Placement) -> None:
        if self._drain is not None:
            if self._stands(self._drain[1]):
                return
            self._stop_draining()
        residents = tuple(self._pool.residents())
        chosen = self._window(placement.numel, {resident for resident in residents if not resident.pinned})
        chosen = chosen or self._moves(placement.numel, residents)
        if chosen is not None:
            self._drain = (placement, chosen)
            for resident in chosen.disturbed:
                resident.draining = True

    def _stands(self, window: Window[Resident]) -> bool:
        """Whether the window that is kept can still be had. Moves were planned for the arena as it was."""
        if any(victim.pinned for victim in window.victims):
            return False
        here = (self._pool.find(resident.layout.digest) is resident for resident in window.disturbed)
        return not window.moves or all(here)

    def _stop_draining(self) -> None:
        assert self._drain is not None
        for resident in self._drain[1].disturbed:
            resident.draining = False
        self._drain = None

    def _window(self, numel: int, usable: Collection[Resident], kept: Sequence[range] = ()) -> Window[Resident] | None:
        segments = self._pool.segments(usable, blocked=kept)
        return choose_window(segments, numel, need_slot=self._pool.num_free_slots == 0)

    def _moves(self, numel: int, residents: Sequence[Resident]) -> Window[Resident] | None:
        """By moving those of these residents that are pinned and evicting the others."""
        pinned = {resident for resident in residents if resident.pinned}
        if not pinned:
            return None
        segments = self._pool.segments(set(residents) - pinned, movable=pinned)
        return choose_moves(segments, numel, need_slot=self._pool.num_free_slots == 0)
