"""Whose adapters are in the pool, and which of an owner's have to leave for another one. Moves nothing.

Content that several owners' names share counts for each of them, as if the others were not there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from gralora_runtime.adapters.residency.pool import AdapterPool, Resident
from gralora_runtime.adapters.residency.share import PoolShare, ShareOf, no_limit
from gralora_runtime.errors import GraloraError


class Shares:
    """Of all owners that have a limit. With the manager's lock held."""

    def __init__(self, pool: AdapterPool, names_of: Callable[[str], Iterable[str]]) -> None:
        """`names_of`: the names that stand for a content, by its digest."""
        self.share_of: ShareOf = no_limit
        self._pool = pool
        self._names_of = names_of

    def share_of_any(self, names: Iterable[str]) -> PoolShare | None:
        """Of the first of these that has a limit."""
        return next((share for share in map(self.share_of, names) if share is not None), None)

    def holdings(self) -> defaultdict[str, list[Resident]]:
        """By owner, of those that have a limit: everything that takes room, also what is on its way in or out."""
        found: defaultdict[str, list[Resident]] = defaultdict(list)
        for resident in self._pool.residents():
            shares = map(self.share_of, self._names_of(resident.layout.digest))
            for owner in {share.owner for share in shares if share is not None}:
                found[owner].append(resident)
        return found

    def excess(self, share: PoolShare, numel: int, own: Iterable[Resident]) -> int:
        """So many elements of the owner's have to leave before so many more may come."""
        return numel + sum(resident.layout.numel for resident in own) - self._max_numel(share)

    def problem(self, name: str, numel: int) -> GraloraError | None:
        """Why an adapter would not fit if every lease ended now: the owner's pinned ones stay."""
        share = self.share_of(name)
        if share is None:
            return None
        pinned = (resident for resident in self.holdings()[share.owner] if resident.pinned)
        if self.excess(share, numel, pinned) <= 0:
            return None
        return share.refusal(name, numel * self._pool.arena.element_size())

    def _max_numel(self, share: PoolShare) -> int:
        return share.max_bytes // self._pool.arena.element_size()


def take(residents: Iterable[Resident], numel: int) -> bool:
    """Whether these take so many elements together."""
    return sum(resident.layout.numel for resident in residents) >= numel


def worth_least(residents: Iterable[Resident], numel: int) -> Sequence[Resident]:
    """As few of them as take so many elements, those that are worth least; all, if they take less."""
    return _until(sorted(residents, key=lambda resident: resident.worth), numel)


def leaving_soonest(residents: Iterable[Resident], numel: int) -> Sequence[Resident]:
    """The same of those that may leave: idle ones first."""
    movable = [resident for resident in residents if not (resident.pinned or resident.leaving)]
    return _until(sorted(movable, key=lambda resident: (not resident.idle, resident.worth)), numel)


def _until(residents: Iterable[Resident], numel: int) -> Sequence[Resident]:
    chosen: list[Resident] = []
    for resident in residents:
        if numel <= 0:
            break
        chosen.append(resident)
        numel -= resident.layout.numel
    return chosen
