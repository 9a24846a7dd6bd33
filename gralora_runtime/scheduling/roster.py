"""Which sequences there are, where each one stands, and what it holds: a seat, pages, its adapter's lease.

Decides nothing. Whatever happens to a sequence, its seat, its pages and its lease are given back here, once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from typing import Final

from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.plan import RowPlan
from gralora_runtime.scheduling.fairness import Ledger
from gralora_runtime.scheduling.pages import PageKey, PagePool
from gralora_runtime.scheduling.sequence import Sequence, SequenceStatus
from gralora_runtime.scheduling.waiting import FairQueue


class Roster:
    """All sequences that have not ended. Only the engine's thread changes it."""

    def __init__(
        self,
        pages: PagePool,
        ledger: Ledger,
        *,
        max_num_seqs: int,
        release_lease: Callable[[AdapterLease], None],
        ended: Callable[[Sequence], None],
    ) -> None:
        """`ended` is told of each sequence that has, once."""
        self.pages: Final = pages
        self.ledger: Final = ledger
        self.waiting: Final = FairQueue(ledger)
        self.running: Final[list[Sequence]] = []  # in order of admission: the last one is the youngest
        self.paused: Final[dict[str, Sequence]] = {}
        self._max_num_seqs = max_num_seqs
        self._release_lease = release_lease
        self._ended = ended
        self._by_id: dict[str, Sequence] = {}
        self._seats = list(range(max_num_seqs - 1, -1, -1))
        self._stays = itertools.count()
        self._arrivals = itertools.count()

    @property
    def has_seat(self) -> bool:
        """One more could run."""
        return bool(self._seats)

    def ids(self) -> list[str]:
        return list(self._by_id)

    def every(self) -> Several[Sequence]:
        """All of them. Other threads may ask: one call copies them, while which the engine's cannot move them."""
        return list(self._by_id.copy().values())

    def get(self, request_id: str) -> Sequence | None:
        """None: it has ended."""
        return self._by_id.get(request_id)

    def of_row(self, row: RowPlan) -> Sequence | None:
        """None if it ended since the step was planned: its id may be another's by now."""
        sequence = self._by_id.get(row.request_id)
        return sequence if sequence is not None and sequence.stay == row.stay else None

    def enter(self, sequence: Sequence) -> None:
        """A new one, which waits. Its lease belongs to the roster from here on."""
        assert sequence.request_id not in self._by_id, f"request id {sequence.request_id!r} used twice"
        self._by_id[sequence.request_id] = sequence
        sequence.number = next(self._arrivals)
        self.ledger.enter(sequence.tenant, sequence.weight)
        self.waiting.add(sequence)

    def start(self, sequence: Sequence, pages: Iterable[int], keys: list[PageKey]) -> None:
        """It waits no more, and takes a seat with these pages, of which the first ones, by `keys`, are computed."""
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.status = SequenceStatus.RUNNING
        sequence.seat, sequence.stay = self._seats.pop(), next(self._stays)
        sequence.pages, sequence.page_keys = tuple(pages), keys
        sequence.num_computed = len(keys) * self.pages.page_size

    def put_back(self, sequence: Sequence) -> None:
        """It gives up its seat and its pages, and waits again."""
        self._leave_seat(sequence)
        self._free_pages(sequence)
        sequence.status = SequenceStatus.WAITING
        self.waiting.put_back(sequence)

    def pause(self, sequence: Sequence) -> None:
        """It gives up its place, whatever that is, until `resume`."""
        if sequence.status is SequenceStatus.RUNNING:
            self._leave_seat(sequence)
            self._free_pages(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.PAUSED
        self.paused[sequence.request_id] = sequence

    def resume(self, sequence: Sequence) -> None:
        """It waits again."""
        del self.paused[sequence.request_id]
        sequence.status = SequenceStatus.WAITING
        self.waiting.put_back(sequence)

    def retire(self, sequence: Sequence) -> None:
        """It has ended."""
        if sequence.status is SequenceStatus.RUNNING:
            self._leave_seat(sequence)
        elif sequence.status is SequenceStatus.PAUSED:
            del self.paused[sequence.request_id]
        else:
            self.waiting.remove(sequence)
        self._free_pages(sequence)
        del self._by_id[sequence.request_id]
        self._end(sequence)

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget sequences after a failure, which may have left them anywhere, and count seats and pages anew. One has
        its lease while it has an id."""
        for sequence in filter(None, [self._by_id.pop(request_id, None) for request_id in request_ids]):
            self.running[:] = [running for running in self.running if running is not sequence]
            self.waiting.discard(sequence)
            self.paused.pop(sequence.request_id, None)
            self._end(sequence)
        taken = {sequence.seat for sequence in self.running}
        self._seats = [seat for seat in range(self._max_num_seqs - 1, -1, -1) if seat not in taken]
        self.pages.reclaim(page for sequence in self.running for page in sequence.pages)

    def check_integrity(self) -> None:
        """Assert that every page lease belongs to exactly one running sequence."""
        self.pages.check_integrity(page for sequence in self.running for page in sequence.pages)
        others = [*self.waiting, *self.paused.values()]
        assert not any(sequence.pages for sequence in others), "a sequence that does not run holds pages"
        assert {*self._by_id.values()} == {*self.running, *others}
        assert (
            len(self._by_id)
            == len(self.running) + len(others)
            == sum(account.requests for account in self.ledger.tenants().values())
        )
        taken = sorted(sequence.seat for sequence in self.running)
        assert sorted(taken + self._seats) == list(range(self._max_num_seqs)), "a seat is lost or taken twice"

    def _leave_seat(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._seats.append(sequence.seat)

    def _free_pages(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages, sequence.page_keys = (), []
        sequence.num_computed = 0

    def _end(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.FINISHED
        self._ended(sequence)
        self.ledger.leave(sequence.tenant)
        self._release_lease(sequence.lease)
