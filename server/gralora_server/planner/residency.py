"""Which adapters are in the pool, in simulated time: who leaves is decided as the server does, leased ones stay."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from gralora_runtime.adapters.residency.eviction import WORTHLESS, worth_after_use
from gralora_runtime.adapters.residency.lease import BASE_LEASE, AdapterLease


class Residency:
    """Adapters by number; each is its own slot. Loads are done one after another, as they share the same cores.

    What leaves the pool is read from disk again: the server's host cache, which makes that shorter, is not counted on.
    """

    def __init__(self, sizes: Sequence[int], *, pool_bytes: int, max_slots: int, load_byte_s: float) -> None:
        self.sizes = sizes
        self.loads = 0
        self.used_bytes = 0
        self.most_bytes = 0
        self.evicted_bytes = 0  # in all
        self._pool_bytes = pool_bytes
        self._max_slots = max_slots
        self._load_byte_s = load_byte_s
        self._resident: dict[int, int] = {}  # adapter -> leases
        self._worth: dict[int, float] = {}  # of staying, of those that are resident
        self._uses = itertools.count(1)
        self._ready_s: dict[int, float] = {}  # of those that are being loaded
        self._loading: list[float] = []  # heap of when loads end
        self._loader_free_s = 0.0

    def acquire(self, adapter: int, now_s: float) -> float | None:
        """Lease it; returns when it can be used. None: everything in the pool is leased, ask again after a release."""
        if adapter < 0:
            return now_s
        if adapter not in self._resident:
            if not self._make_room(self.sizes[adapter]):
                return None
            self._load(adapter, now_s)
        self._resident[adapter] += 1
        self._use(adapter)
        return max(now_s, self._ready_s.get(adapter, 0.0))

    def fill(self) -> None:
        """The first ones, as many as fit, without a load. They leave last one first."""
        for adapter, size in enumerate(self.sizes):
            if not self._fits(size):
                break
            self._place(adapter)
        for adapter in reversed(self._resident):
            self._use(adapter)

    def release(self, adapter: int) -> None:
        if adapter >= 0:
            self._resident[adapter] -= 1

    def busy_until_s(self, now_s: float) -> float | None:
        """When the load that is under way ends; None if there is none."""
        while self._loading and self._loading[0] <= now_s:
            heapq.heappop(self._loading)
        return self._loading[0] if self._loading else None

    def _load(self, adapter: int, now_s: float) -> None:
        self._loader_free_s = max(now_s, self._loader_free_s) + self.sizes[adapter] * self._load_byte_s
        self._ready_s[adapter] = self._loader_free_s
        heapq.heappush(self._loading, self._loader_free_s)
        self.loads += 1
        self._place(adapter)

    def _use(self, adapter: int) -> None:
        self._worth[adapter] = worth_after_use(self._worth.get(adapter, WORTHLESS), next(self._uses))

    def _place(self, adapter: int) -> None:
        self._resident[adapter] = 0
        self.used_bytes += self.sizes[adapter]
        self.most_bytes = max(self.most_bytes, self.used_bytes)

    def _make_room(self, num_bytes: int) -> bool:
        idle = [adapter for adapter, leases in self._resident.items() if not leases]
        for adapter in sorted(idle, key=self._worth.__getitem__):
            if self._fits(num_bytes):
                break
            del self._resident[adapter], self._worth[adapter]
            self.used_bytes -= self.sizes[adapter]
            self.evicted_bytes += self.sizes[adapter]
        return self._fits(num_bytes)

    def _fits(self, num_bytes: int) -> bool:
        return self.used_bytes + num_bytes <= self._pool_bytes and len(self._resident) < self._max_slots


def lease_of(adapter: int) -> AdapterLease:
    """What the scheduler is given: its slot is the adapter's number."""
    if adapter < 0:
        return BASE_LEASE
    return AdapterLease(name=str(adapter), digest=str(adapter), slot=adapter, generation=0, width=0, serial=adapter + 1)
