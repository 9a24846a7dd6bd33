"""Who waits for room in the pool, and which adapters make it. Tenants in turn; decides, but moves no memory.

When the first in line finds no idle room, the adapters that would make it get no new leases until it has moved in, so
it waits for requests that are already running and for no others. Those behind it may use any room but that. Pinned
adapters stay in the pool, but for the first in line they change places.

An adapter whose owner has its share of the pool already takes the place of the owner's own idle ones. If they are too
few it is held back: others pass it, and as many of the owner's as it needs get no new leases until it has moved in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from gralora_runtime.adapters.catalogue.store import AdapterVersion
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter
from gralora_runtime.adapters.residency.compaction import choose_moves
from gralora_runtime.adapters.residency.eviction import Window, choose_window
from gralora_runtime.adapters.residency.pool import AdapterPool, Resident
from gralora_runtime.adapters.residency.share import PoolShare
from gralora_runtime.adapters.residency.shares import Shares, leaving_soonest, take, worth_least
from gralora_runtime.adapters.turns import Turns

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
    owner: str = ""  # of a share of the pool; "": there is no limit
    held_back: bool = False  # the owner's share is in use
    excess: int = 0  # elements of the owner's that have to leave for it

    @property
    def names(self) -> Iterable[str]:
        """Whose it is, of all who want it: that of the first, and of a mix those of its parts."""
        return (member.name for member in self.versions[0].members)


OwnersDrain = tuple[Placement, Sequence[Resident]]  # for whom, and who


class PlacementQueue:
    """Placements, and the room kept for the first one."""

    def __init__(self, pool: AdapterPool, shares: Shares) -> None:
        self._pool = pool
        self._shares = shares
        self.turns: Turns[Placement] = Turns()  # whoever adds a placement says who waits for it
        self._waiting: dict[str, Placement] = {}  # by digest
        self._drain: tuple[Placement, Window[Resident]] | None = None
        self._owners_drains: dict[str, OwnersDrain] = {}  # by owner

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Placement]:
        return iter(tuple(self.turns))

    def find(self, digest: str) -> Placement | None:
        return self._waiting.get(digest)

    def add(self, placement: Placement) -> None:
        """Weights that are still in the pool come from there: two stays of one content would be one too many."""
        if self._pool.find(placement.digest) is not None:
            placement.adapter = None
        self._waiting[placement.digest] = placement

    def remove(self, placement: Placement) -> None:
        del self._waiting[placement.digest]
        if placement.moving:
            self.turns.take(placement)
        else:
            self.turns.remove(placement)
        if self._drain is not None and self._drain[0] is placement:
            self._stop_draining()
        of_owners = {owner: drain for owner, drain in self._owners_drains.items() if drain[0] is not placement}
        if len(of_owners) < len(self._owners_drains):
            self._owners_drains = of_owners
            self._mark_draining()

    def possible(self, numel: int) -> bool:
        """Whether an adapter of this size would fit if every lease ended now: pinned ones stay, wherever."""
        pinned = [resident.layout.numel for resident in self._pool.residents() if resident.pinned]
        return len(pinned) < self._pool.max_slots and sum(pinned) + numel <= self._pool.ranges.numel

    def pick(self) -> tuple[Placement, Window[Resident]] | None:
        """The next adapter that can move in, and where; whoever has to go or to move is marked as leaving."""
        holdings = self._hold_back()
        ready = (placement for placement in self._ready() if not placement.held_back)
        for position, placement in enumerate(islice(ready, 1 + LOOKAHEAD)):
            is_first = position == 0
            if is_first and self._drain is not None and self._drain[0] is not placement:
                self._stop_draining()
            own = holdings.get(placement.owner, ()) if placement.excess else ()
            window = self._room(placement, own, is_first=is_first)
            if window is not None:
                placement.moving = True
                for resident in window.disturbed:
                    resident.leaving = True
                return placement, window
            if is_first:
                self._start_draining(placement)
        return None

    def _ready(self) -> Iterator[Placement]:
        return (placement for placement in self.turns if placement.adapter is not None)

    def _hold_back(self) -> Mapping[str, Sequence[Resident]]:
        """Who waits for adapters of its owner's, and which of these get no new leases; all that owners have."""
        shares = [(placement, self._shares.share_of_any(placement.names)) for placement in self._ready()]
        holdings = self._shares.holdings() if any(share for _, share in shares) else {}
        before, self._owners_drains = self._owners_drains, {}
        waiting: set[str] = set()  # owners of which somebody waits for their share: those behind it wait, too
        for placement, share in shares:
            placement.owner, placement.excess, placement.held_back = "", 0, False
            if share is None:
                continue
            placement.owner, placement.held_back = share.owner, share.owner in waiting
            if not placement.held_back:
                self._claim(placement, share, holdings.get(share.owner, ()), before.get(share.owner))
            if placement.excess:
                waiting.add(share.owner)
        if self._drain is not None and self._drain[0].held_back:
            self._stop_draining()
        elif before or self._owners_drains:
            self._mark_draining()
        return holdings

    def _claim(
        self, placement: Placement, share: PoolShare, own: Sequence[Resident], before: OwnersDrain | None
    ) -> None:
        """For the first of its owner's in line. Until it moves in, those that were drained for it stay so."""
        placement.excess = max(0, self._shares.excess(share, placement.numel, own))
        placement.held_back = not take((one for one in own if one.idle), placement.excess)
        if placement.held_back or (before is not None and before[0] is placement):
            self._owners_drains[share.owner] = (placement, leaving_soonest(own, placement.excess))

    def _room(self, placement: Placement, own: Sequence[Resident], *, is_first: bool) -> Window[Resident] | None:
        """`own`: those of its owner, if some have to leave. They go first, and more of them where room is elsewhere."""
        idle = {resident for resident in own if resident.idle}
        window = self._room_of_idle(placement, idle, is_first=is_first) if idle else None
        if window is None:
            window = self._room_of_first(placement) if is_first else self._room_behind(placement)
        if window is None:
            return None
        lacking = placement.excess - sum(one.layout.numel for one in window.victims if one in idle)
        return replace(window, victims=(*window.victims, *worth_least(idle - set(window.victims), lacking)))

    def _room_of_first(self, placement: Placement) -> Window[Resident] | None:
        """Idle adapters leave or, where that makes no room, change places."""
        still = [resident for resident in self._pool.residents() if resident.still]
        idle = [resident for resident in still if resident.idle]
        window = self._room_of_idle(placement, idle, is_first=True)
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
        idle = [resident for resident in self._pool.residents() if resident.idle]
        return self._room_of_idle(placement, idle, is_first=False)

    def _room_of_idle(
        self, placement: Placement, idle: Iterable[Resident], *, is_first: bool
    ) -> Window[Resident] | None:
        """For others than the first in line nothing that is kept for it."""
        if is_first or self._drain is None:
            return self._window(placement.numel, set(idle))
        kept = self._drain[1]
        return self._window(placement.numel, set(idle).difference(kept.disturbed), kept.ranges)

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
            self._mark_draining()

    def _stands(self, window: Window[Resident]) -> bool:
        """Whether the window that is kept can still be had. Moves were planned for the arena as it was."""
        if any(victim.pinned for victim in window.victims):
            return False
        here = (self._pool.find(resident.layout.digest) is resident for resident in window.disturbed)
        return not window.moves or all(here)

    def _stop_draining(self) -> None:
        self._drain = None
        self._mark_draining()

    def _mark_draining(self) -> None:
        drained = set(() if self._drain is None else self._drain[1].disturbed)
        drained.update(*(residents for _, residents in self._owners_drains.values()))
        for resident in self._pool.residents():
            resident.draining = resident in drained

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
