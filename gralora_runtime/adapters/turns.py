"""Whose turn it is among tenants that wait for something of which there is one at a time. Knows not what it is.

Tenants take turns by their weights, and each one's come in order of arrival. Who comes anew comes before whoever had
its turn meanwhile, and at most one of each other tenant's before it. Only who waits, or did just now, costs anything.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class Turns(Generic[Item]):
    """What several tenants wait for stands in the line of each, and is taken where its turn comes first."""

    def __init__(self) -> None:
        self._lines: dict[str, dict[Item, int]] = {}  # by tenant: its items, and when they came
        self._askers: dict[Item, set[str]] = {}
        self._weights: dict[str, float] = {}  # of tenants that wait
        self._turns: dict[str, float] = {}  # start tags (start-time fair queueing): of who waits, or is ahead of `_now`
        self._now = 0.0  # the last turn that was taken
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._askers)

    def __contains__(self, item: Item) -> bool:
        return item in self._askers

    def __iter__(self) -> Iterator[Item]:
        """In the order in which they would be taken if nobody else came."""
        told: set[Item] = set()
        for _, _, item in heapq.merge(*map(self._line, tuple(self._lines)), key=lambda place: place[:2]):
            if item not in told:
                told.add(item)
                yield item

    @property
    def tenants(self) -> frozenset[str]:
        """Who waits."""
        return frozenset(self._lines)

    def add(self, item: Item, tenant: str, weight: float = 1.0) -> None:
        """This tenant waits for it, beside others that may wait for it already."""
        if tenant not in self._lines:
            self._lines[tenant] = {}
            self._turns[tenant] = max(self._now, self._turns.get(tenant, self._now))
        self._weights[tenant] = weight
        self._lines[tenant].setdefault(item, next(self._arrivals))
        self._askers.setdefault(item, set()).add(tenant)

    def take(self, item: Item) -> None:
        """It has its turn, which counts for the tenant of those that wait for it that was next."""
        tenant = min(self._askers[item], key=lambda asker: self._turns[asker])
        price = 1.0 / self._weights[tenant]
        self._now = max(self._now, self._turns[tenant])
        self._turns[tenant] += price
        self.remove(item)
        if not self._lines:  # only who has it now comes after whoever comes meanwhile
            self._now, self._turns = 0.0, {tenant: price}

    def remove(self, item: Item) -> None:
        """It leaves without a turn."""
        for tenant in self._askers.pop(item):
            del self._lines[tenant][item]
            if not self._lines[tenant]:
                del self._lines[tenant], self._weights[tenant]
        waits = self._lines
        self._turns = {who: turn for who, turn in self._turns.items() if who in waits or turn > self._now}

    def clear(self) -> None:
        """As at the beginning."""
        self._lines.clear()
        self._askers.clear()
        self._weights.clear()
        self._turns.clear()
        self._now = 0.0

    def _line(self, tenant: str) -> Iterator[tuple[float, int, Item]]:
        turn, weight = self._turns[tenant], self._weights[tenant]
        return ((turn + at / weight, came, item) for at, (item, came) in enumerate(self._lines[tenant].items()))
