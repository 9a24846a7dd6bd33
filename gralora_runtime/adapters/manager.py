"""The only part of the adapter code that the rest of the runtime talks to: names in, leases out, from any thread.

Reading from disk, moving weights and zeroing are the mover's, in its threads; the lock is held for bookkeeping only.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gralora_kernels.packing import ROW_MAJOR, Packing
from gralora_runtime.adapters.answers import Answers
from gralora_runtime.adapters.catalogue.names import check_name, resolve_source
from gralora_runtime.adapters.catalogue.scan import Found, Scan, adapter_directories
from gralora_runtime.adapters.catalogue.store import AdapterRecord, AdapterState, AdapterStore, Waiter
from gralora_runtime.adapters.checkpoint.header import AdapterSummary, inspect
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter, check_width
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.info import AdapterInfo, AdapterResidency, AdapterStats, Residence, UnloadResult
from gralora_runtime.adapters.residency.host_cache import HostCache
from gralora_runtime.adapters.residency.lease import BASE_LEASE, AdapterLease
from gralora_runtime.adapters.residency.mover import Mover, log_if_unexpected
from gralora_runtime.adapters.residency.pool import AdapterPool, Resident
from gralora_runtime.adapters.residency.transfer import no_steps
from gralora_runtime.errors import (
    AdapterBusyError,
    AdapterExistsError,
    AdapterNotFoundError,
    ConfigError,
    DrainingError,
)


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
        packing: Packing = ROW_MAJOR,
        wait_for_steps: Callable[[], None] = no_steps,
    ) -> None:
        if adapters_dir is not None and not adapters_dir.is_dir():
            raise ConfigError(f"adapters_dir: there is no directory {str(adapters_dir)!r}")
        self.pool = AdapterPool(
            modules=modules,
            device=device,
            dtype=dtype,
            pool_bytes=pool_bytes,
            max_slots=max_slots,
            packing=packing,
            wait_for_steps=wait_for_steps,
        )
        self.base_model = base_model
        self._modules = tuple(modules)
        self._max_width = max_width
        self._adapters_dir = adapters_dir.resolve() if adapters_dir else None
        self._lock = threading.Lock()
        self._store = AdapterStore()
        self._cache = HostCache(host_cache_bytes)
        self._leases: dict[int, tuple[AdapterRecord, Resident]] = {}  # by serial
        self._serials = itertools.count(1)
        self._clock = itertools.count(1)  # orders uses of residents
        self._closed = False
        self._mover = Mover(
            pool=self.pool,
            store=self._store,
            cache=self._cache,
            modules=self._modules,
            max_width=max_width,
            root=self._adapters_dir,
            answering=self._answering,
            serve=self._serve,
        )
        for source in adapter_directories(self._adapters_dir) if self._adapters_dir else ():
            self._store.add(AdapterRecord(name=source.name, source=source))
        self._scan = Scan(tuple(self._store), self._summarize, self._on_looked_into)
        self._scan.run()

    # For requests.

    def acquire(self, name: str) -> Future[AdapterLease]:
        """A lease on the adapter, once it is in the pool. Cancelling the future withdraws the wish."""
        if name == "":
            done: Future[AdapterLease] = Future()
            done.set_result(BASE_LEASE)
            return done
        check_name("adapter", name)
        with self._answering() as answers:
            self._refuse_when_closed()
            return self._enter(self._store.get(name), Waiter(future=Future(), wants_lease=True), answers)

    def release(self, lease: AdapterLease) -> None:
        """Give a lease back, exactly once."""
        if lease.slot == BASE_LEASE.slot:
            return
        with self._answering() as answers:
            held = self._leases.pop(lease.serial, None)
            if held is None:
                raise RuntimeError(f"{lease} is not held: it was released before")
            record, resident = held
            record.leases -= 1
            resident.leases -= 1
            if resident.leases == 0 and self._mover.num_waiting:
                self._mover.wake(answers)

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
        with self._answering() as answers:
            self._refuse_when_closed()
            record = self._store.find(name)
            if record is None:
                record = AdapterRecord(name=name, source=source, provisional=True)
                self._store.add(record)
            elif record.digest:
                self._mover.read(record, source, partial(self._on_compared, record, waiter), answers)
                return waiter.future
            elif source != record.source.resolve():
                if record.error is None:
                    raise AdapterExistsError(name, f"not known yet, from {record.source.name}")
                record.source = source
            return self._enter(record, waiter, answers)

    def unload(self, name: str) -> UnloadResult:
        """Forget a name; its weights go too, and leave zeros, unless another name has the same content."""
        check_name("name", name)
        with self._answering() as answers:
            record = self._store.get(name)
            if record.in_flight:
                raise AdapterBusyError(name, record.in_flight)
            self._store.remove(record)
            resident = self.pool.find(record.digest)
            is_last = next(self._store.sharing(record.digest), None) is None
            cached = self._cache.pop(record.digest) if is_last else None
            pool_bytes = self._pool_bytes(resident.layout.numel) if resident and is_last else 0
            if resident and not is_last:
                self._mover.refresh_pin(resident)
                self._mover.wake(answers)
            if resident and is_last and not resident.leaving:
                self.pool.withdraw(resident)
                answers.later(partial(self._mover.erase, resident))
        return UnloadResult(
            name=name,
            digest=record.digest,
            pool_bytes_freed=pool_bytes,
            host_bytes_freed=cached.num_bytes if cached else 0,
        )

    def pin(self, name: str, pinned: bool) -> AdapterInfo:
        """Keep an adapter in the pool, or no longer. One that is not there is loaded in the background."""
        check_name("name", name)
        with self._answering() as answers:
            self._refuse_when_closed()
            record = self._store.get(name)
            resident = self.pool.find(record.digest)
            if pinned and resident is None and (problem := self._mover.capacity_problem(record)):
                raise problem
            record.pinned = pinned
            if resident is not None:
                self._mover.refresh_pin(resident)
            if pinned and (resident is None or resident.leaving):
                self._enter(record, Waiter(future=Future(), wants_lease=False), answers)
            self._mover.wake(answers)
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
                loads=self._mover.loads,
                load_failures=self._mover.load_failures,
                load_s=self._mover.load_s.read(),
                placements=self._mover.placements,
                evictions=self._mover.evictions,
            )

    def residency(self, limit: int, first: Collection[str] = ()) -> AdapterResidency:
        """Where all adapters are, and by name at most `limit` that are in memory: `first`, then the last used ones.

        The lock is not held while thousands of them are gone through.
        """
        with self._lock:
            records = tuple(self._store)
        states = [(record, self._state(record)) for record in records]
        here = [(r, state) for r, state in states if state in (AdapterState.RESIDENT, AdapterState.HOST)]
        here.sort(key=lambda found: (found[0].name not in first, -found[0].last_used_s, found[0].name))
        counts = Counter(state for _, state in states)
        return AdapterResidency(
            {state: counts[state] for state in AdapterState},
            tuple(
                Residence(record.name, state, self._pool_bytes(record.summary.packed_numel))
                for record, state in here[:limit]
                if record.summary is not None
            ),
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
        with self._answering() as answers:
            self._closed = True
            self._scan.stop()
            self._mover.close(answers)
        self._mover.join()

    # Below: with the lock held, but for those that take it.

    @contextmanager
    def _answering(self) -> Iterator[Answers]:
        """Takes the lock; what was settled under it is delivered after it."""
        answers = Answers(self.release)
        try:
            with self._lock:
                yield answers
        finally:
            answers.deliver()

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise DrainingError

    def _enter(self, record: AdapterRecord, waiter: Waiter, answers: Answers) -> Future[Any]:
        """Serve the waiter at once, or let it wait for a load that is under way or begins now."""
        resident = self.pool.find(record.digest)
        if resident is not None and resident.open:
            self._serve(record, resident, waiter, answers)
            return waiter.future
        answers.later(partial(waiter.future.add_done_callback, partial(self._on_answered, record, waiter)))
        record.waiters.append(waiter)
        if not record.loading:
            self._mover.start(record, answers)
        return waiter.future

    def _serve(self, record: AdapterRecord, resident: Resident, waiter: Waiter, answers: Answers) -> None:
        resident.last_used = next(self._clock)
        record.last_used_s = time.time()
        if waiter.pin:
            record.pinned = True
            self._mover.refresh_pin(resident)
        if not waiter.wants_lease:
            answers.result(waiter.future, self._info(record))
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
        answers.result(waiter.future, lease)

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

    def _summarize(self, name: str, source: Path) -> AdapterSummary:
        header = inspect(source, name=name, root=self._adapters_dir)
        header.fitting_plan(self._modules)
        summary = header.summary(self._modules, keeps_16_bit=self.pool.packing.keeps_16_bit)
        check_width(name, summary.equivalent_rank, self._max_width)
        return summary

    def _on_looked_into(self, record: AdapterRecord, found: Found) -> None:
        """In a thread of the scan. A request may have been faster, or an operator; what they found is newer."""
        with self._lock:
            if record.summary or record.error or record.loading or self._store.find(record.name) is not record:
                return
            if isinstance(found, AdapterSummary):
                record.summary = found
            else:
                record.error = found

    def _on_answered(self, record: AdapterRecord, waiter: Waiter, future: Future[Any]) -> None:
        """When it was cancelled rather than answered: nobody waits there any more."""
        if not future.cancelled():
            return
        with self._answering() as answers:
            if waiter in record.waiters:
                record.waiters.remove(waiter)
                if not record.waiters:
                    self._mover.forget(record, answers)

    def _release_answer(self, acquired: Future[AdapterLease]) -> None:
        if not acquired.cancelled() and acquired.exception() is None:
            self.release(acquired.result())

    def _on_compared(self, record: AdapterRecord, waiter: Waiter, read: Future[LoadedAdapter]) -> None:
        if read.cancelled():
            waiter.future.cancel()
            return
        error = read.exception()
        log_if_unexpected(record.name, error)
        if not waiter.future.set_running_or_notify_cancel():
            return
        with self._answering() as answers:
            if self._closed:
                error = DrainingError()
            elif self._store.find(record.name) is not record:
                error = AdapterNotFoundError(record.name)
            elif error is None and read.result().digest != record.digest:
                error = AdapterExistsError(record.name, record.digest)
            if error is not None:
                answers.error(waiter.future, error)
                return
            self._mover.keep(read.result())
            self._enter(record, waiter, answers)
