"""Who waits, in the order in which they are to be served: the tenant that was served least, and of a tenant the request
of the highest priority that came first. Knows nothing of steps."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator

from gralora_runtime.scheduling.fairness import Account, Ledger
from gralora_runtime.scheduling.sequence import Sequence

SLACK = 64  # entries that are out of date may be as many as the others, and so many more


def place_in_line(sequence: Sequence) -> tuple[int, int]:
    """Among those of its tenant. Who has to wait again has the place that it had."""
    return (-sequence.priority, sequence.number)


class FairQueue:
    """All waiting sequences. `first` takes as long as its changes since the last call, however many tenants wait."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lines: dict[str, list[Sequence]] = {}  # never empty
        self._entries: dict[str, tuple[float, tuple[int, int], str]] = {}  # by tenant: its one valid entry of the heap
        self._heap: list[tuple[float, tuple[int, int], str]] = []
        self._size = 0
        self._left_last: Account | None = None  # whose last waiting request was taken

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines.values():
            yield from line

    def add(self, sequence: Sequence) -> None:
        """A new request. Its tenant starts no lower than whoever waits already, or waited last."""
        if sequence.tenant not in self._lines:
            least = self.first()
            other = self._left_last if least is None else self._ledger.account(least.tenant)
            account = self._ledger.account(sequence.tenant)
            if other is not None:
                account.served = max(account.served, other.served)
        self.put_back(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """One that was taken, and has to wait again."""
        insort(self._lines.setdefault(sequence.tenant, []), sequence, key=place_in_line)
        self._size += 1
        self._note(sequence.tenant)

    def remove(self, sequence: Sequence) -> None:
        """It waits no more, for whatever reason."""
        line = self._lines[sequence.tenant]
        line.remove(sequence)
        self._size -= 1
        if line:
            self._note(sequence.tenant)
            return
        del self._lines[sequence.tenant], self._entries[sequence.tenant]
        self._left_last = self._ledger.account(sequence.tenant)

    def discard(self, sequence: Sequence) -> None:
        """As `remove`, if it is there."""
        if any(waiting is sequence for waiting in self._lines.get(sequence.tenant, ())):
            self.remove(sequence)

    def first(self) -> Sequence | None:
        """Whose turn it is."""
        while self._heap:
            entry = self._heap[0]
            tenant = entry[2]
            if entry is not self._entries.get(tenant):
                heapq.heappop(self._heap)
            elif entry != self._entry(tenant):  # it was served more meanwhile
                self._entries[tenant] = changed = self._entry(tenant)
                heapq.heapreplace(self._heap, changed)
            else:
                return self._lines[tenant][0]
        return None

    def _entry(self, tenant: str) -> tuple[float, tuple[int, int], str]:
        return (self._ledger.account(tenant).served, place_in_line(self._lines[tenant][0]), tenant)

    def _note(self, tenant: str) -> None:
        self._entries[tenant] = entry = self._entry(tenant)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + SLACK:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)
