"""The only part of the adapter code that the rest of the runtime talks to: names in, leases out, from any thread.

Reading from disk, moving weights and zeroing happen in this file's own threads; the lock is held for bookkeeping only.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gralora_runtime.adapters.cache import HostCache
from gralora_runtime.adapters.checkpoint import AdapterSummary, inspect
from gralora_runtime.adapters.info import AdapterInfo, AdapterStats, UnloadResult
from gralora_runtime.adapters.lease import BASE_LEASE, AdapterLease
from gralora_runtime.adapters.loader import LoadedAdapter, check_width, load
from gralora_runtime.adapters.names import check_name, resolve_source
from gralora_runtime.adapters.placement import Placement, PlacementQueue
from gralora_runtime.adapters.pool import AdapterPool, Resident
from gralora_runtime.adapters.settlement import Settlement
from gralora_runtime.adapters.spec import ModuleShape, rejected
from gralora_runtime.adapters.store import AdapterRecord, AdapterState, AdapterStore, Waiter
from gralora_runtime.adapters.window import Window
from gralora_runtime.errors import (
    AdapterBusyError,
    AdapterCapacityError,
    AdapterExistsError,
    AdapterNotFoundError,
    ConfigError,
    DrainingError,
    GraloraError,
)

log = logging.getLogger(__name__)

NUM_READERS = 2  # a slow disk holds up at most so many loads before the others wait
READ_AHEAD = 16  # adapters in memory on their way to the pool: what waits beyond that waits on disk


class AdapterManager:
    """Catalogue, host cache and pool under one lock. A held lease keeps its adapter where it is."""

    def __init__(
        self,
        *,
        modules: Sequence[ModuleShape],
        device: torch.device,
        dtype: torch.dtype,
        pool_bytes: int,
        max_slots: int,
        host_cache_bytes: int,
        adapters_dir: Path | None,
        base_model: str,
        max_width: int,
    ) -> None:
        if adapters_dir is not None and not adapters_dir.is_dir():
            raise ConfigError(f"adapters_dir: there is no directory {str(adapters_dir)!r}")
        self.pool = AdapterPool(modules=modules, device=device, dtype=dtype, pool_bytes=pool_bytes, max_slots=max_slots)
        self.base_model = base_model
        self._modules = tuple(modules)
        self._max_width = max_width
        self._adapters_dir = adapters_dir.resolve() if adapters_dir else None
        self._lock = threading.Lock()
        self._store = AdapterStore()
        self._cache = HostCache(host_cache_bytes)
        self._to_read: deque[AdapterRecord] = deque()
        self._num_reading = 0
        self._queue = PlacementQueue(self.pool)
        self._leases: dict[int, tuple[AdapterRecord, Resident]] = {}  # by serial
        self._serials = itertools.count(1)
        self._clock = itertools.count(1)  # orders uses of residents
        self._loads = self._placements = self._evictions = 0
        self._pump_scheduled = False
        self._closed = False
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="adapter-reader")
        self._placer = ThreadPoolExecutor(1, thread_name_prefix="adapter-placer")
        if self._adapters_dir is not None:
            self._store.scan(self._adapters_dir, self._summarize)

    # For requests.

    def acquire(self, name: str) -> Future[AdapterLease]:
        """A lease on the adapter, once it is in the pool. Cancelling the future withdraws the wish."""
        if name == "":
            done: Future[AdapterLease] = Future()
            done.set_result(BASE_LEASE)
            return done
        check_name("adapter", name)
        with self._settling() as settle:
            self._refuse_when_closed()
            return self._enter(self._store.get(name), Waiter(future=Future(), wants_lease=True), settle)

    def release(self, lease: AdapterLease) -> None:
        """Give a lease back, exactly once."""
        if lease.slot == BASE_LEASE.slot:
            return
        with self._settling() as settle:
            held = self._leases.pop(lease.serial, None)
            if held is None:
                raise RuntimeError(f"{lease} is not held: it was released before")
            record, resident = held
            record.leases -= 1
            resident.leases -= 1
            if resident.leases == 0 and self._queue:
                self._schedule_pump(settle)

    def abandon(self, acquired: Future[AdapterLease]) -> None:
        """Give up an `acquire`, answered or not. For a task that was cancelled and cannot know which of the two."""
        if not acquired.cancel():
            acquired.add_done_callback(self._release_answer)

    # For operators.

    def load(self, name: str, path: Path | None = None, *, pin: bool = False) -> Future[AdapterInfo]:
        """Register a directory below the adapters directory and bring it into the pool.

        For a known name the files are read again: the same content is fine, other content needs an `unload` first.
        """
        check_name("name", name)
        source = resolve_source(self._adapters_dir, path or Path(name))
        waiter = Waiter(future=Future(), wants_lease=False, pin=pin)
        with self._settling() as settle:
            self._refuse_when_closed()
            record = self._store.find(name)
            if record is None:
                record = AdapterRecord(name=name, source=source, provisional=True)
                self._store.add(record)
            elif record.digest:
                self._read(record, source, partial(self._on_compared, record, waiter), settle)
                return waiter.future
            elif source != record.source.resolve():
                if record.error is None:
                    raise AdapterExistsError(name, f"not known yet, from {record.source.name}")
                record.source = source
            return self._enter(record, waiter, settle)

    def unload(self, name: str) -> UnloadResult:
        """Forget a name; its weights go too, and leave zeros, unless another name has the same content."""
        check_name("name", name)
        with self._settling() as settle:
            record = self._store.get(name)
            if record.in_flight:
                raise AdapterBusyError(name, record.in_flight)
            self._store.remove(record)
            resident = self.pool.find(record.digest)
            is_last = next(self._store.sharing(record.digest), None) is None
            cached = self._cache.pop(record.digest) if is_last else None
            pool_bytes = self._pool_bytes(resident.layout.numel) if resident and is_last else 0
            if resident and not is_last:
                self._refresh_pin(resident)
                self._schedule_pump(settle)
            if resident and is_last and not resident.leaving:
                self.pool.withdraw(resident)
                settle.later(partial(self._erase, resident))
        return UnloadResult(
            name=name,
            digest=record.digest,
            pool_bytes_freed=pool_bytes,
            host_bytes_freed=cached.num_bytes if cached else 0,
        )

    def pin(self, name: str, pinned: bool) -> AdapterInfo:
        """Keep an adapter in the pool, or no longer. One that is not there is loaded in the background."""
        check_name("name", name)
        with self._settling() as settle:
            self._refuse_when_closed()
            record = self._store.get(name)
            resident = self.pool.find(record.digest)
            if pinned and resident is None and (problem := self._capacity_problem(record)):
                raise problem
            record.pinned = pinned
            if resident is not None:
                self._refresh_pin(resident)
            if pinned and (resident is None or resident.leaving):
                self._enter(record, Waiter(future=Future(), wants_lease=False), settle)
            self._schedule_pump(settle)
            return self._info(record)

    def get(self, name: str) -> AdapterInfo:
        check_name("name", name)
        with self._lock:
            return self._info(self._store.get(name))

    def list(self) -> tuple[AdapterInfo, ...]:
        """All adapters by name. The lock is not held while thousands of them are described."""
        with self._lock:
            records = tuple(self._store)
        return tuple(self._info(record) for record in sorted(records, key=lambda record: record.name))

    def stats(self) -> AdapterStats:
        with self._lock:
            return AdapterStats(
                adapters=len(self._store),
                leases=len(self._leases),
                waiting=sum(len(record.waiters) for record in self._store),
                slots_used=self.pool.max_slots - self.pool.num_free_slots,
                slots_total=self.pool.max_slots,
                pool_bytes_used=self.pool.used_bytes,
                pool_bytes_total=self.pool.total_bytes,
                host_bytes_used=self._cache.used_bytes,
                host_bytes_total=self._cache.capacity_bytes,
                loads=self._loads,
                placements=self._placements,
                evictions=self._evictions,
            )

    def check_integrity(self) -> None:
        """Every slot, element and lease is accounted for once, at any moment; raises AssertionError when not."""
        with self._lock:
            self.pool.check_integrity()
            self._cache.check_integrity()
            of_records = sum(record.leases for record in self._store)
            assert self.pool.num_leases == of_records == len(self._leases), "leases"
            for record, resident in self._leases.values():
                assert self.pool.find(record.digest) is resident, f"a lease on {record.name} lost its slot"
            for record in self._store:
                assert record.loading or not record.waiters, f"{record.name} has waiters and nobody loads it"
                resident_or_none = self.pool.find(record.digest)
                both = resident_or_none is not None and record.digest in self._cache
                assert not both, f"{record.name} is in the pool and in the cache"

    def close(self) -> None:
        """Answer everybody who waits, and stop the threads."""
        with self._settling() as settle:
            self._closed = True
            self._to_read.clear()
            for record in tuple(self._store):
                self._fail(record, DrainingError(), settle)
            for placement in self._queue:
                if not placement.moving:
                    self._queue.remove(placement)
        self._readers.shutdown(cancel_futures=True)
        self._placer.shutdown(cancel_futures=True)

    # Below: with the lock held, unless the comment says otherwise.

    @contextmanager
    def _settling(self) -> Iterator[Settlement]:
        """Takes the lock; what was settled under it is delivered after it."""
        settlement = Settlement(self.release)
        try:
            with self._lock:
                yield settlement
        finally:
            settlement.deliver()

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise DrainingError

    def _enter(self, record: AdapterRecord, waiter: Waiter, settle: Settlement) -> Future[Any]:
        """Serve the waiter at once, or let it wait for a load that is under way or begins now."""
        resident = self.pool.find(record.digest)
        if resident is not None and resident.open:
            self._serve(record, resident, waiter, settle)
            return waiter.future
        settle.later(partial(waiter.future.add_done_callback, partial(self._on_answered, record, waiter)))
        record.waiters.append(waiter)
        if not record.loading:
            self._start(record, settle)
        return waiter.future

    def _serve(self, record: AdapterRecord, resident: Resident, waiter: Waiter, settle: Settlement) -> None:
        resident.last_used = next(self._clock)
        record.last_used_s = time.time()
        if waiter.pin:
            record.pinned = True
            self._refresh_pin(resident)
        if not waiter.wants_lease:
            settle.result(waiter.future, self._info(record))
            return
        lease = AdapterLease(
            name=record.name,
            digest=resident.layout.digest,
            slot=resident.slot,
            generation=resident.generation,
            width=resident.layout.width,
            serial=next(self._serials),
        )
        self._leases[lease.serial] = (record, resident)
        record.leases += 1
        resident.leases += 1
        settle.result(waiter.future, lease)

    def _start(self, record: AdapterRecord, settle: Settlement) -> None:
        """Fetch the adapter from wherever it is: the pool (on its way out), host memory or disk."""
        record.loading = True
        record.error = None
        if problem := self._capacity_problem(record):
            self._fail(record, problem, settle)
            return
        cached = self._cache.pop(record.digest)
        resident = self.pool.find(record.digest)
        if cached is not None:
            self._wait_for_room(record, cached, settle)
        elif resident is not None:
            self._join(record, Placement(digest=record.digest, numel=resident.layout.numel, adapter=None), settle)
        else:
            self._to_read.append(record)
            self._read_more(settle)

    def _read_more(self, settle: Settlement) -> None:
        """Read on, in order of arrival, while little enough waits for room. Nobody's wish any more: not read at all."""
        while self._to_read and self._num_reading + len(self._queue) < READ_AHEAD:
            record = self._to_read.popleft()
            if record.waiters:
                self._num_reading += 1
                self._read(record, record.source, partial(self._on_read, record), settle)
            else:
                record.loading = False

    def _read(
        self, record: AdapterRecord, source: Path, on_done: Callable[[Future[LoadedAdapter]], None], settle: Settlement
    ) -> None:
        read = self._readers.submit(
            load,
            record.name,
            source,
            self._modules,
            self.pool.arena.dtype,
            max_width=self._max_width,
            root=self._adapters_dir,
        )
        settle.later(partial(read.add_done_callback, on_done))

    def _wait_for_room(self, record: AdapterRecord, adapter: LoadedAdapter, settle: Settlement) -> None:
        if not self._queue.possible(adapter.layout.numel):
            self._fail(record, self._no_room(record, adapter.layout.numel), settle)
            self._keep(adapter)
            return
        self._join(record, Placement(digest=adapter.digest, numel=adapter.layout.numel, adapter=adapter), settle)

    def _join(self, record: AdapterRecord, placement: Placement, settle: Settlement) -> None:
        """Queue for the pool, behind the name that brought the same content first if there is one."""
        queued = self._queue.find(placement.digest)
        if queued is None:
            self._queue.add(placement)
        (queued or placement).records.append(record)
        self._schedule_pump(settle)

    def _keep(self, adapter: LoadedAdapter) -> None:
        """Into the host cache, unless the weights are somewhere else or nobody's any more."""
        elsewhere = self.pool.find(adapter.digest) or self._queue.find(adapter.digest)
        if elsewhere is None and next(self._store.sharing(adapter.digest), None) is not None:
            self._cache.put(adapter)

    def _fail(self, record: AdapterRecord, error: BaseException, settle: Settlement) -> None:
        """The load is over. Room and shutting down are not the adapter's fault, so they leave no mark on it."""
        record.loading = False
        if not isinstance(error, (AdapterCapacityError, DrainingError)):
            record.error = error
        waiters, record.waiters = record.waiters, []
        for waiter in waiters:
            settle.error(waiter.future, error)
        if record.provisional:
            self._store.remove(record)

    def _refresh_pin(self, resident: Resident) -> None:
        resident.pinned = any(record.pinned for record in self._store.sharing(resident.layout.digest))

    def _capacity_problem(self, record: AdapterRecord) -> AdapterCapacityError | None:
        """What is known before reading. Content not read yet may turn out to be in the pool under another name."""
        if record.summary is None:
            return None
        numel = record.summary.packed_numel
        elsewhere = not record.digest or self.pool.find(record.digest) is not None
        fits = numel <= self.pool.ranges.numel if elsewhere else self._queue.possible(numel)
        return None if fits else self._no_room(record, numel)

    def _no_room(self, record: AdapterRecord, numel: int) -> AdapterCapacityError:
        return AdapterCapacityError(record.name, self._pool_bytes(numel), self.pool.total_bytes)

    def _pool_bytes(self, numel: int) -> int:
        return numel * self.pool.arena.element_size()

    def _info(self, record: AdapterRecord) -> AdapterInfo:
        return AdapterInfo(
            name=record.name,
            state=self._state(record),
            digest=record.digest,
            source=str(record.source),
            pinned=record.pinned,
            in_flight=record.in_flight,
            last_used_s=record.last_used_s,
            pool_bytes=self._pool_bytes(record.summary.packed_numel) if record.summary else 0,
            error=str(record.error) if record.error else "",
            summary=record.summary,
        )

    def _state(self, record: AdapterRecord) -> AdapterState:
        resident = self.pool.find(record.digest)
        if resident is not None and resident.open:
            return AdapterState.RESIDENT
        if record.loading:
            return AdapterState.LOADING
        if record.error is not None:
            return AdapterState.FAILED
        return AdapterState.HOST if record.digest in self._cache or resident else AdapterState.REGISTERED

    def _schedule_pump(self, settle: Settlement) -> None:
        if not (self._pump_scheduled or self._closed):
            self._pump_scheduled = True
            settle.later(partial(self._placer.submit(self._pump).add_done_callback, self._on_pumped))

    # Below: without the lock, called by futures, the readers and the placer.

    def _summarize(self, name: str, source: Path) -> AdapterSummary:
        header = inspect(source, name=name, root=self._adapters_dir)
        if problems := header.fits(self._modules):
            raise rejected(name, problems)
        summary = header.summary(self._modules)
        check_width(name, summary.equivalent_rank, self._max_width)
        return summary

    def _release_answer(self, acquired: Future[AdapterLease]) -> None:
        if not acquired.cancelled() and acquired.exception() is None:
            self.release(acquired.result())

    def _on_answered(self, record: AdapterRecord, waiter: Waiter, future: Future[Any]) -> None:
        """When it was cancelled rather than answered: an adapter that nobody waits for any more gives up its place."""
        if not future.cancelled():
            return
        with self._settling() as settle:
            if waiter not in record.waiters:
                return
            record.waiters.remove(waiter)
            placement = self._queue.find(record.digest)
            if record.waiters or placement is None or record not in placement.records or placement.moving:
                return
            placement.records.remove(record)
            record.loading = False
            if not placement.records:
                self._take_out(placement)
            self._schedule_pump(settle)

    def _take_out(self, placement: Placement) -> None:
        """With the lock: it will not move in."""
        self._queue.remove(placement)
        if placement.adapter is not None:
            self._keep(placement.adapter)

    def _on_read(self, record: AdapterRecord, read: Future[LoadedAdapter]) -> None:
        if read.cancelled():
            return
        error = read.exception()
        _log_if_unexpected(record.name, error)
        with self._settling() as settle:
            self._num_reading -= 1
            self._schedule_pump(settle)
            if self._store.find(record.name) is not record or self._closed:
                return
            if error is None and record.digest not in ("", read.result().digest):
                changed = f"its files changed from digest {record.digest} to {read.result().digest}"
                error = rejected(record.name, [f"{changed} after it was loaded: unload it, then load it again"])
            if error is not None:
                self._fail(record, error, settle)
                return
            self._take_in(record, read.result(), settle)

    def _take_in(self, record: AdapterRecord, adapter: LoadedAdapter, settle: Settlement) -> None:
        """With the lock: weights came from disk. Another name may have brought the same ones already."""
        self._loads += 1
        record.digest = adapter.digest
        record.summary = adapter.layout.summary
        resident = self.pool.find(adapter.digest)
        if resident is not None and resident.open:
            self._arrive(record, resident, settle)
        elif record.waiters:
            self._wait_for_room(record, adapter, settle)
        else:
            record.loading = record.provisional = False
            self._keep(adapter)

    def _on_compared(self, record: AdapterRecord, waiter: Waiter, read: Future[LoadedAdapter]) -> None:
        if read.cancelled():
            waiter.future.cancel()
            return
        error = read.exception()
        _log_if_unexpected(record.name, error)
        if not waiter.future.set_running_or_notify_cancel():
            return
        with self._settling() as settle:
            if self._closed:
                error = DrainingError()
            elif self._store.find(record.name) is not record:
                error = AdapterNotFoundError(record.name)
            elif error is None and read.result().digest != record.digest:
                error = AdapterExistsError(record.name, record.digest)
            if error is not None:
                settle.error(waiter.future, error)
                return
            self._keep(read.result())
            self._enter(record, waiter, settle)

    def _pump(self) -> None:
        """In the placer: move adapters in until the next one has to wait."""
        while (move := self._next_move()) is not None:
            placement, window = move
            for victim in window.victims:
                self._evict(victim)
            self._place(placement, window)

    def _next_move(self) -> tuple[Placement, Window[Resident]] | None:
        with self._settling() as settle:
            move = self._queue.pick()
            while move is None and self._settle_in_place(settle):
                move = self._queue.pick()
            self._pump_scheduled = move is not None
            if not self._closed:
                self._read_more(settle)
            return move

    def _settle_in_place(self, settle: Settlement) -> bool:
        """With the lock: whether somebody could be served, or sent away, without moving anything."""
        for position, placement in enumerate(self._queue):
            resident = self.pool.find(placement.digest)
            if resident is not None and resident.open:  # it was to leave, but may stay after all
                self._queue.remove(placement)
                for record in placement.records:
                    self._arrive(record, resident, settle)
                return True
            if position == 0 and resident is None and not self._queue.possible(placement.numel):
                for record in placement.records:
                    self._fail(record, self._no_room(record, placement.numel), settle)
                self._take_out(placement)
                return True
        return False

    def _evict(self, victim: Resident) -> None:
        adapter = self.pool.read(victim)
        self.pool.clear(victim)
        with self._lock:
            self.pool.withdraw(victim)
            self.pool.release(victim)
            self._evictions += 1
            placement = self._queue.find(adapter.digest)
            if placement is not None:
                placement.adapter = adapter
            else:
                self._keep(adapter)

    def _place(self, placement: Placement, window: Window[Resident]) -> None:
        assert placement.adapter is not None
        with self._lock:
            resident = self.pool.reserve(placement.adapter.layout, window.offset)
        self.pool.fill(resident, placement.adapter)
        with self._settling() as settle:
            self.pool.publish(resident)
            self._queue.remove(placement)
            self._placements += 1
            self._refresh_pin(resident)
            resident.last_used = next(self._clock)
            for record in placement.records:
                self._arrive(record, resident, settle)
            is_orphan = next(self._store.sharing(placement.digest), None) is None
            if is_orphan:  # unloaded while it moved in
                self.pool.withdraw(resident)
                settle.later(partial(self._erase, resident))

    def _arrive(self, record: AdapterRecord, resident: Resident, settle: Settlement) -> None:
        """With the lock: the load is over, everybody is served."""
        record.loading = record.provisional = False
        waiters, record.waiters = record.waiters, []
        for waiter in waiters:
            self._serve(record, resident, waiter, settle)

    def _erase(self, resident: Resident) -> None:
        """Zero what nobody can find any more, then give its room back."""
        self.pool.clear(resident)
        with self._settling() as settle:
            self.pool.release(resident)
            self._schedule_pump(settle)

    def _on_pumped(self, pumped: Future[None]) -> None:
        """A pump that raises is our bug: nobody may be left waiting for it."""
        error = None if pumped.cancelled() else pumped.exception()
        if error is None:
            return
        log.critical("placing an adapter failed", exc_info=error)
        with self._settling() as settle:
            self._pump_scheduled = False
            for placement in self._queue:
                self._queue.remove(placement)
                for record in placement.records:
                    self._fail(record, error, settle)


def _log_if_unexpected(name: str, error: BaseException | None) -> None:
    if error is not None and not isinstance(error, GraloraError):
        log.error("loading adapter %r failed", name, exc_info=error)
