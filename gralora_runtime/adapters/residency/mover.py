"""Brings adapters from disk and host memory into the pool, in its own threads. Knows records, not requests.

Methods that take a `Answers` are called with the manager's lock held; the others must not be.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from gralora_runtime.adapters.answers import Answers
from gralora_runtime.adapters.catalogue.store import AdapterRecord, AdapterStore, Waiter
from gralora_runtime.adapters.checkpoint.header import files_stamp
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter, load
from gralora_runtime.adapters.checkpoint.spec import ModuleShape, rejected, to_keep
from gralora_runtime.adapters.residency.eviction import Window
from gralora_runtime.adapters.residency.host_cache import HostCache
from gralora_runtime.adapters.residency.placement import Placement, PlacementQueue
from gralora_runtime.adapters.residency.pool import AdapterPool, Resident
from gralora_runtime.errors import AdapterCapacityError, AdapterRejectedError, DrainingError, GraloraError
from gralora_runtime.observation.histogram import REQUEST_S, Histogram

log = logging.getLogger(__name__)

NUM_READERS = 2  # a slow disk holds up at most so many loads before the others wait
READ_AHEAD = 16  # adapters in memory on their way to the pool: what waits beyond that waits on disk

Serve = Callable[[AdapterRecord, Resident, Waiter, Answers], None]


class Mover:
    """Reads, places and evicts. One thread places, so that room which was made for an adapter stays its own."""

    def __init__(
        self,
        *,
        pool: AdapterPool,
        store: AdapterStore,
        cache: HostCache,
        modules: Sequence[ModuleShape],
        max_width: int,
        root: Path | None,
        answering: Callable[[], AbstractContextManager[Answers]],
        serve: Serve,
    ) -> None:
        self.loads = self.load_failures = self.placements = self.evictions = 0
        self.load_s = Histogram(REQUEST_S)  # observed under the lock: there are several readers
        self._pool = pool
        self._store = store
        self._cache = cache
        self._modules = tuple(modules)
        self._max_width = max_width
        self._root = root
        self._answering = answering  # takes the lock
        self._serve = serve  # what a waiter gets once its adapter is there
        self._to_read: deque[AdapterRecord] = deque()
        self._num_reading = 0
        self._queue = PlacementQueue(pool)
        self._is_awake = False
        self._closed = False
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="adapter-reader")
        self._placer = ThreadPoolExecutor(1, thread_name_prefix="adapter-placer")

    def start(self, record: AdapterRecord, answers: Answers) -> None:
        """Fetch the adapter from wherever it is: the pool (on its way out), host memory or disk."""
        record.loading = True
        record.error = None
        if problem := self.capacity_problem(record):
            self.fail(record, problem, answers)
            return
        cached = self._cache.pop(record.digest)
        resident = self._pool.find(record.digest)
        if cached is not None:
            self._wait_for_room(record, cached, answers)
        elif resident is not None:
            self._join(record, Placement(digest=record.digest, numel=resident.layout.numel, adapter=None), answers)
        else:
            self._to_read.append(record)
            self._read_more(answers)

    def read(
        self, record: AdapterRecord, source: Path, on_done: Callable[[Future[LoadedAdapter]], None], answers: Answers
    ) -> None:
        answers.later(partial(self._readers.submit(self._load, record, source).add_done_callback, on_done))

    def forget(self, record: AdapterRecord, answers: Answers) -> None:
        """Nobody waits for this name any more: unless it is being moved in, it gives up its place."""
        placement = self._queue.find(record.digest)
        if placement is None or record not in placement.records or placement.moving:
            return
        placement.records.remove(record)
        record.loading = False
        if not placement.records:
            self._take_out(placement)
        self.wake(answers)

    def keep(self, adapter: LoadedAdapter) -> None:
        """Into the host cache, unless the weights are somewhere else or nobody's any more."""
        elsewhere = self._pool.find(adapter.digest) or self._queue.find(adapter.digest)
        if elsewhere is None and next(self._store.sharing(adapter.digest), None) is not None:
            self._cache.put(adapter)

    def fail(self, record: AdapterRecord, error: BaseException, answers: Answers) -> None:
        """The load is over. Room and shutting down are not the adapter's fault, so they leave no mark on it."""
        record.loading = False
        if not isinstance(error, (AdapterCapacityError, DrainingError)):
            record.error = error
        waiters, record.waiters = record.waiters, []
        for waiter in waiters:
            answers.error(waiter.future, error)
        if record.provisional:
            self._store.remove(record)

    def refresh_pin(self, resident: Resident) -> None:
        resident.pinned = any(record.pinned for record in self._store.sharing(resident.layout.digest))

    def capacity_problem(self, record: AdapterRecord) -> AdapterCapacityError | None:
        """What is known before reading. Content not read yet may turn out to be in the pool under another name."""
        if record.summary is None:
            return None
        numel = record.summary.packed_numel
        elsewhere = not record.digest or self._pool.find(record.digest) is not None
        fits = numel <= self._pool.ranges.numel if elsewhere else self._queue.possible(numel)
        return None if fits else self._no_room(record, numel)

    @property
    def num_waiting(self) -> int:
        """Adapters that wait for room."""
        return len(self._queue)

    def wake(self, answers: Answers) -> None:
        """Something changed that could let somebody move in."""
        if not (self._is_awake or self._closed):
            self._is_awake = True
            answers.later(partial(self._placer.submit(self._pump).add_done_callback, self._on_pumped))

    def close(self, answers: Answers) -> None:
        """Start nothing more, and tell everybody who waits. `join` afterwards."""
        self._closed = True
        self._to_read.clear()
        for record in tuple(self._store):
            self.fail(record, DrainingError(), answers)
        for placement in self._queue:
            if not placement.moving:
                self._queue.remove(placement)

    def join(self) -> None:
        """Wait for the threads; without the lock, which they need to finish."""
        self._readers.shutdown(cancel_futures=True)
        self._placer.shutdown(cancel_futures=True)

    def erase(self, resident: Resident) -> None:
        """Zero what nobody can find any more, then give its room back."""
        self._pool.clear(resident)
        with self._answering() as answers:
            self._pool.release(resident)
            self.wake(answers)

    def _load(self, record: AdapterRecord, source: Path) -> LoadedAdapter:
        """In a reader. Files that were refused are not read again until they change: a customer who asks for a broken
        adapter again and again must not keep the others' from being read.
        """
        stamp = (source, files_stamp(source))
        if record.refused is not None and record.refused[0] == stamp:
            raise to_keep(record.refused[1])  # or its traceback would grow by each raise
        started_s, failures = time.perf_counter(), 1
        try:
            adapter = load(
                record.name,
                source,
                self._modules,
                self._pool.arena.dtype,
                max_width=self._max_width,
                root=self._root,
                packing=self._pool.packing,
                spread=self._pool.spread,
            )
            failures = 0
        except AdapterRejectedError as error:
            record.refused = (stamp, to_keep(error))
            raise
        finally:
            with self._answering():
                self.load_s.observe(time.perf_counter() - started_s)
                self.load_failures += failures
        return adapter

    def _read_more(self, answers: Answers) -> None:
        """Read on, in order of arrival, while little enough waits for room. Nobody's wish any more: not read at all."""
        while self._to_read and self._num_reading + len(self._queue) < READ_AHEAD:
            record = self._to_read.popleft()
            if record.waiters:
                self._num_reading += 1
                self.read(record, record.source, partial(self._on_read, record), answers)
            else:
                record.loading = False

    def _wait_for_room(self, record: AdapterRecord, adapter: LoadedAdapter, answers: Answers) -> None:
        if not self._queue.possible(adapter.layout.numel):
            self.fail(record, self._no_room(record, adapter.layout.numel), answers)
            self.keep(adapter)
            return
        self._join(record, Placement(digest=adapter.digest, numel=adapter.layout.numel, adapter=adapter), answers)

    def _join(self, record: AdapterRecord, placement: Placement, answers: Answers) -> None:
        """Queue for the pool, behind the name that brought the same content first if there is one."""
        queued = self._queue.find(placement.digest)
        if queued is None:
            self._queue.add(placement)
        (queued or placement).records.append(record)
        self.wake(answers)

    def _arrive(self, record: AdapterRecord, resident: Resident, answers: Answers) -> None:
        """The load is over, everybody is served."""
        record.loading = record.provisional = False
        waiters, record.waiters = record.waiters, []
        for waiter in waiters:
            self._serve(record, resident, waiter, answers)

    def _take_out(self, placement: Placement) -> None:
        """It will not move in."""
        self._queue.remove(placement)
        if placement.adapter is not None:
            self.keep(placement.adapter)

    def _no_room(self, record: AdapterRecord, numel: int) -> AdapterCapacityError:
        return AdapterCapacityError(record.name, numel * self._pool.arena.element_size(), self._pool.total_bytes)

    def _take_in(self, record: AdapterRecord, adapter: LoadedAdapter, answers: Answers) -> None:
        """Weights came from disk. Another name may have brought the same ones already."""
        self.loads += 1
        record.digest = adapter.digest
        record.summary = adapter.layout.summary
        resident = self._pool.find(adapter.digest)
        if resident is not None and resident.open:
            self._arrive(record, resident, answers)
        elif record.waiters:
            self._wait_for_room(record, adapter, answers)
        else:
            record.loading = record.provisional = False
            self.keep(adapter)

    def _serve_in_place(self, answers: Answers) -> bool:
        """Whether somebody could be served, or sent away, without moving anything."""
        for position, placement in enumerate(self._queue):
            resident = self._pool.find(placement.digest)
            if resident is not None and resident.open:  # it was to leave, but may stay after all
                self._queue.remove(placement)
                for record in placement.records:
                    self._arrive(record, resident, answers)
                return True
            if position == 0 and resident is None and not self._queue.possible(placement.numel):
                for record in placement.records:
                    self.fail(record, self._no_room(record, placement.numel), answers)
                self._take_out(placement)
                return True
        return False

    def _on_read(self, record: AdapterRecord, read: Future[LoadedAdapter]) -> None:
        if read.cancelled():
            return
        error = read.exception()
        log_if_unexpected(record.name, error)
        with self._answering() as answers:
            self._num_reading -= 1
            self.wake(answers)
            if self._store.find(record.name) is not record or self._closed:
                return
            if error is None and record.digest not in ("", read.result().digest):
                changed = f"its files changed from digest {record.digest} to {read.result().digest}"
                error = rejected(record.name, [f"{changed} after it was loaded: unload it, then load it again"])
            if error is not None:
                self.fail(record, error, answers)
                return
            self._take_in(record, read.result(), answers)

    def _pump(self) -> None:
        """In the placer: move adapters in until the next one has to wait."""
        while (move := self._next_move()) is not None:
            placement, window = move
            for victim in window.victims:
                self._evict(victim)
            self._place(placement, window)

    def _next_move(self) -> tuple[Placement, Window[Resident]] | None:
        with self._answering() as answers:
            move = self._queue.pick()
            while move is None and self._serve_in_place(answers):
                move = self._queue.pick()
            self._is_awake = move is not None
            if not self._closed:
                self._read_more(answers)
            return move

    def _evict(self, victim: Resident) -> None:
        adapter = self._pool.read(victim)
        self._pool.clear(victim)
        with self._answering():
            self._pool.withdraw(victim)
            self._pool.release(victim)
            self.evictions += 1
            placement = self._queue.find(adapter.digest)
            if placement is not None:
                placement.adapter = adapter
            else:
                self.keep(adapter)

    def _place(self, placement: Placement, window: Window[Resident]) -> None:
        assert placement.adapter is not None
        with self._answering():
            resident = self._pool.reserve(placement.adapter.layout, window.offset)
        self._pool.fill(resident, placement.adapter)
        with self._answering() as answers:
            self._pool.publish(resident)
            self._queue.remove(placement)
            self.placements += 1
            self.refresh_pin(resident)
            for record in placement.records:
                self._arrive(record, resident, answers)
            is_orphan = next(self._store.sharing(placement.digest), None) is None
            if is_orphan:  # unloaded while it moved in
                self._pool.withdraw(resident)
                answers.later(partial(self.erase, resident))

    def _on_pumped(self, pumped: Future[None]) -> None:
        """A pump that raises is our bug: nobody may be left waiting for it."""
        error = None if pumped.cancelled() else pumped.exception()
        if error is None:
            return
        log.critical("placing an adapter failed", exc_info=error)
        with self._answering() as answers:
            self._is_awake = False
            for placement in self._queue:
                self._queue.remove(placement)
                for record in placement.records:
                    self.fail(record, error, answers)


def log_if_unexpected(name: str, error: BaseException | None) -> None:
    if error is not None and not isinstance(error, GraloraError):
        log.error("loading adapter %r failed", name, exc_info=error)
