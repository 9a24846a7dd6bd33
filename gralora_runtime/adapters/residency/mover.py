"""Brings adapters from disk and host memory into the pool, in its own threads. Knows versions, not requests.

Methods that take a `Answers` are called with the manager's lock held; the others must not be.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from gralora_runtime.adapters.answers import Answers
from gralora_runtime.adapters.catalogue.store import AdapterStore, AdapterVersion, Mix, Waiter
from gralora_runtime.adapters.checkpoint.affine import BaseLayers
from gralora_runtime.adapters.checkpoint.header import files_stamp
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter, load
from gralora_runtime.adapters.checkpoint.spec import ModuleShape, to_keep
from gralora_runtime.adapters.oddities import Oddities
from gralora_runtime.adapters.residency.eviction import Window
from gralora_runtime.adapters.residency.host_cache import HostCache
from gralora_runtime.adapters.residency.placement import Placement, PlacementQueue
from gralora_runtime.adapters.residency.pool import AdapterPool, Resident
from gralora_runtime.adapters.residency.shares import Shares
from gralora_runtime.adapters.turns import Item, Turns
from gralora_runtime.errors import (
    AdapterCapacityError,
    AdapterRejectedError,
    DrainingError,
    GraloraError,
    MemoryShortageError,
    QuotaExceededError,
)
from gralora_runtime.observation.adapter_way import Station
from gralora_runtime.observation.histogram import REQUEST_S, Histogram
from gralora_runtime.shortage import out_of_memory

log = logging.getLogger(__name__)

NUM_READERS = 2  # a slow disk holds up at most so many loads before the others wait
# Adapters in memory on their way to the pool, and their bytes: what waits beyond that waits on disk, but for one.
READ_AHEAD = 16
READ_AHEAD_BYTES = 1 << 30
BESIDE_OTHERS = 2  # times as much, for tenants that have nothing on its way: what others brought may wait for long
# Before the pool is prepared, and then before each piece while steps run or somebody reads. A megabyte that was never
# written takes a core for 2 to 10 ms, in which nobody who was just given an adapter should have to compute.
REST_S = 0.01
BUSY_REST_S = 0.025

Serve = Callable[[AdapterVersion, Resident, Waiter, Answers], None]
Changed = Callable[[AdapterVersion, LoadedAdapter, Answers], None]
Forget = Callable[[AdapterVersion, Answers], None]
Examine = Callable[[AdapterVersion, Resident, Answers], None]


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
        base_layers: BaseLayers | None,
        allowed_keys: Collection[str],
        answering: Callable[[], AbstractContextManager[Answers]],
        serve: Serve,
        changed: Changed,
        forget: Forget,
        moved: Callable[[AdapterVersion], None],
        make: Callable[[Mix, Answers], None],
        identified: Callable[[AdapterVersion], None],
        examine: Examine,
        vocab_size: int,
        known_tokens: int = 0,
        oddities: Oddities,
    ) -> None:
        self.loads = self.load_failures = self.placements = self.evictions = self.moves = 0
        self.load_s = Histogram(REQUEST_S)  # observed under the lock: there are several readers
        self._pool = pool
        self._store = store
        self._cache = cache
        self._modules = tuple(modules)
        self._max_width = max_width
        self._base_layers = base_layers
        self._allowed_keys = allowed_keys
        self._answering = answering  # takes the lock
        self._serve = serve  # what a waiter gets once its adapter is there
        self._changed = changed  # a version's files hold other content than it had
        self._examine = examine  # a version is there that has to answer golden prompts first
        self._known_tokens = known_tokens
        self._vocab_size = vocab_size  # 0: it is not known, and golden prompts do not count
        self._identified = identified  # a version was read: what it is, is known
        self._moved = moved  # something is different about where a version's weights are
        self._make = make  # a mix of parts, which brings it back by `end_read`
        self._oddities = oddities
        self._forget = forget  # a version that came with a load which failed
        self._to_read: Turns[AdapterVersion] = Turns()
        self._to_read_last: dict[AdapterVersion, None] = {}  # once nothing else is to be read
        self._reading: dict[AdapterVersion, int] = {}  # and the bytes that it will take
        self.shares = Shares(
            pool, lambda digest: (one.name for version in store.sharing(digest) for one in version.members)
        )
        self._queue = PlacementQueue(pool, self.shares)
        self._is_awake = False
        self._called = threading.Event()  # the placer is wanted: it has nothing to prepare now
        self._closed = False
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="adapter-reader")
        self._placer = ThreadPoolExecutor(1, thread_name_prefix="adapter-placer")

    def start(self, version: AdapterVersion, answers: Answers) -> None:
        """Fetch the adapter from wherever it is: the pool (on its way out), host memory or disk."""
        version.loading = True
        version.error = None
        self._moved(version)
        if problem := self.capacity_problem(version):
            self.fail(version, problem, answers)
            return
        cached = self._cache.pop(version.digest)
        resident = self._pool.find(version.digest)
        if cached is not None:
            self._wait_for_room(version, cached, answers)
        elif resident is not None:
            self._join(version, Placement(digest=version.digest, numel=resident.layout.numel, adapter=None), answers)
        elif isinstance(version, Mix):
            version.way.reach(Station.READ)
            self._make(version, answers)
        else:
            version.way.reach(Station.LINE)
            if all(waiter.patient for waiter in version.waiters):
                self._to_read_last[version] = None
            else:
                _stand_in_turn(self._to_read, version, version.waiters)
            self._read_more(answers)

    def read(self, version: AdapterVersion, on_done: Callable[[Future[LoadedAdapter]], None], answers: Answers) -> None:
        """In a reader. `version` need not be anybody's: then it only says where to read."""
        answers.later(partial(self._readers.submit(self.fetch, version).add_done_callback, on_done))

    def work(self, work: Callable[[], LoadedAdapter]) -> Future[LoadedAdapter]:
        """In a reader. Not once this is closed."""
        return self._readers.submit(work)

    def copy(self, resident: Resident) -> Future[LoadedAdapter]:
        """Of weights that somebody has a lease on, made by whoever else would move them. Not once this is closed."""
        self._called.set()
        return self._placer.submit(self._pool.read, resident)

    def hurry(self, version: AdapterVersion, waiter: Waiter) -> None:
        """Somebody more waits now for what is to be read or to be placed: its turn may come sooner than the others'."""
        placement = self._queue.find(version.digest)
        if version in self._to_read or version in self._to_read_last:
            self._to_read_last.pop(version, None)
            _stand_in_turn(self._to_read, version, (waiter,))
        elif placement is not None and not placement.moving:
            _stand_in_turn(self._queue.turns, placement, (waiter,))

    def forget(self, version: AdapterVersion, answers: Answers) -> None:
        """Nobody waits for this name any more: unless it is being moved in, it gives up its place."""
        placement = self._queue.find(version.digest)
        if placement is None or version not in placement.versions or placement.moving:
            return
        placement.versions.remove(version)
        version.loading = False
        if not placement.versions:
            self._take_out(placement)
        self.wake(answers)

    def keep(self, adapter: LoadedAdapter) -> None:
        """Into the host cache, unless the weights are somewhere else or nobody's any more."""
        elsewhere = self._pool.find(adapter.digest) or self._queue.find(adapter.digest)
        if elsewhere is None and self._store.sharing(adapter.digest):
            self._cache.put(adapter)
            self._moved_all(adapter.digest)

    def fail(self, version: AdapterVersion, error: BaseException, answers: Answers) -> None:
        """The load is over. Room and shutting down are not the adapter's fault, so they leave no mark on it."""
        version.loading = False
        self._moved(version)
        if not isinstance(error, (AdapterCapacityError, QuotaExceededError, DrainingError, MemoryShortageError)):
            version.error = error
        waiters, version.waiters = version.waiters, []
        for waiter in waiters:
            answers.error(waiter.future, error)
        if version.provisional:
            self._forget(version, answers)

    def refresh_pin(self, resident: Resident) -> None:
        resident.pinned = self._store.pinned(resident.layout.digest)

    def capacity_problem(self, version: AdapterVersion) -> GraloraError | None:
        """What is known before reading. Content not read yet may turn out to be in the pool under another name."""
        if version.summary is None:
            return None
        numel = version.summary.packed_numel
        elsewhere = not version.digest or self._pool.find(version.digest) is not None
        if elsewhere:
            return None if numel <= self._pool.ranges.numel else self._no_room(version, numel)
        return self._never_fits(version, numel)

    @property
    def num_waiting(self) -> int:
        """Adapters that wait for room."""
        return len(self._queue)

    def wake(self, answers: Answers) -> None:
        """Something changed that could let somebody move in."""
        if not (self._is_awake or self._closed):
            self._is_awake = True
            self._called.set()
            answers.later(partial(self._placer.submit(self._pump).add_done_callback, self._on_pumped))

    def await_memory(self, timeout_s: float) -> None:
        """Until what the placer does now is done: at start, preparing memory."""
        wait([self._placer.submit(_nothing)], timeout_s)

    def close(self, answers: Answers) -> None:
        """Start nothing more, and tell everybody who waits. `join` afterwards."""
        self._closed = True
        self._called.set()
        self._to_read.clear()
        self._to_read_last.clear()
        for version in (*self._store.versions(), *self._store.mixes()):
            self.fail(version, DrainingError(), answers)
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

    def fetch(self, version: AdapterVersion) -> LoadedAdapter:
        """Read and check its files, in the calling thread.

        Files that were refused are not read again until they change, or it is worth another try: a customer who asks
        for a broken adapter again and again must not keep the others' from being read.
        """
        source, roots = version.place
        stamp = (source, files_stamp(source))
        if version.refused is not None and version.refused[0] == stamp and version.quarantine.lasts:
            raise to_keep(version.refused[1])  # or its traceback would grow by each raise
        version.way.reach(Station.READ)
        started_s, failures = time.perf_counter(), 1
        try:
            adapter = load(
                version.name,
                source,
                self._modules,
                self._pool.arena.dtype,
                max_width=self._max_width,
                roots=roots,
                allowed_keys=self._allowed_keys,
                vocab_size=self._vocab_size,
                known_tokens=self._known_tokens,
                packing=self._pool.packing,
                spread=self._pool.spread,
                base=self._base_layers,
            )
            failures = 0
            version.stamp = stamp[1] if source == version.source else None
        except AdapterRejectedError as error:
            version.refused = (stamp, to_keep(error))
            version.quarantine.extend()
            raise
        except Exception as error:
            if out_of_memory(error):
                raise MemoryShortageError(f"adapter {version.name!r} was read") from error
            raise
        finally:
            with self._answering():
                self.load_s.observe(time.perf_counter() - started_s)
                self.load_failures += failures
        return replace(
            adapter,
            has_golden=adapter.has_golden and self._vocab_size > 0,
            warnings=self._warnings(version, adapter, source, roots),
        )

    def _warnings(
        self, version: AdapterVersion, adapter: LoadedAdapter, source: Path, roots: Sequence[Path]
    ) -> tuple[str, ...]:
        """Of content that was read before, what was found then: looking for it may take longer than reading."""
        if version.warnings is not None and version.digest == adapter.digest:
            return version.warnings
        return self._oddities.of_content(adapter, source, roots)

    def _read_more(self, answers: Answers) -> None:
        """Read on, tenants in turn, while little enough waits for room. Nobody's wish any more: not read at all.

        No more than there are readers: who comes next is decided when one is free.
        """
        while len(self._reading) < NUM_READERS and (version := self._next_to_read()) is not None:
            self._to_read_last.pop(version, None)
            if version in self._to_read and version.waiters:
                self._to_read.take(version)
            elif version in self._to_read:
                self._to_read.remove(version)
            if version.waiters:
                self._reading[version] = self._expected_bytes(version)
                self.read(version, partial(self._on_read, version), answers)
            else:
                version.loading = False

    def _next_to_read(self) -> AdapterVersion | None:
        """Not of an owner whose share is in use: what was read would wait in memory, which others need as well."""
        full = {placement.owner for placement in self._queue if placement.held_back}
        waiting = (version for version in self._to_read or self._to_read_last if not self._is_full(version, full))
        first = next(waiting, None)
        if first is None or self._has_room_ahead(first):
            return first
        busy = self._tenants_ahead()
        if self._to_read.tenants <= busy:
            return None
        light = (version for version in (first, *waiting) if busy.isdisjoint(one.tenant for one in version.waiters))
        return next((version for version in light if self._has_room_ahead(version, BESIDE_OTHERS)), None)

    def _is_full(self, version: AdapterVersion, full: Collection[str]) -> bool:
        share = self.shares.share_of_any(one.name for one in version.members) if full else None
        return share is not None and share.owner in full

    def _tenants_ahead(self) -> set[str]:
        """Who has something on its way."""
        placed = (version for placement in self._queue for version in placement.versions)
        return {waiter.tenant for version in (*self._reading, *placed) for waiter in version.waiters}

    def _has_room_ahead(self, version: AdapterVersion, times: int = 1) -> bool:
        ahead = [placement for placement in self._queue if not placement.held_back]
        num_bytes = sum(placement.adapter.num_bytes for placement in ahead if placement.adapter is not None)
        num_bytes += sum(self._reading.values())
        if num_bytes and num_bytes + self._expected_bytes(version) > times * READ_AHEAD_BYTES:
            return False
        return len(self._reading) + len(ahead) < times * READ_AHEAD

    def _expected_bytes(self, version: AdapterVersion) -> int:
        """One that nobody has looked into yet counts as one of as many as may be on their way."""
        if version.summary is None:
            return READ_AHEAD_BYTES // READ_AHEAD
        return version.summary.packed_numel * self._pool.arena.element_size()

    def _wait_for_room(self, version: AdapterVersion, adapter: LoadedAdapter, answers: Answers) -> None:
        if problem := self._never_fits(version, adapter.layout.numel):
            self.fail(version, problem, answers)
            self.keep(adapter)
            return
        self._join(version, Placement(digest=adapter.digest, numel=adapter.layout.numel, adapter=adapter), answers)

    def _join(self, version: AdapterVersion, placement: Placement, answers: Answers) -> None:
        """Queue for the pool, behind the name that brought the same content first if there is one."""
        queued = self._queue.find(placement.digest)
        if queued is None:
            self._queue.add(placement)
        version.way.reach(Station.ROOM)
        version.way.num_bytes = placement.numel * self._pool.arena.element_size()
        (queued or placement).versions.append(version)
        _stand_in_turn(self._queue.turns, queued or placement, version.waiters)
        self.wake(answers)

    def arrive(self, version: AdapterVersion, resident: Resident, answers: Answers) -> None:
        """The load is over, everybody is served; but who has golden prompts has to answer them first."""
        if version.untried:
            self._examine(version, resident, answers)
            return
        version.loading = version.provisional = False
        version.quarantine.end()
        waiters, version.waiters = version.waiters, []
        for waiter in waiters:
            self._serve(version, resident, waiter, answers)

    def _take_out(self, placement: Placement) -> None:
        """It will not move in."""
        self._queue.remove(placement)
        if placement.adapter is not None:
            self.keep(placement.adapter)

    def _moved_all(self, digest: str) -> None:
        for version in self._store.sharing(digest):
            self._moved(version)

    def _never_fits(self, version: AdapterVersion, numel: int) -> GraloraError | None:
        """Not even if every lease ended now."""
        if not self._queue.possible(numel):
            return self._no_room(version, numel)
        problems = (self.shares.problem(one.name, numel) for one in version.members)
        return next((problem for problem in problems if problem is not None), None)

    def _no_room(self, version: AdapterVersion, numel: int) -> AdapterCapacityError:
        return AdapterCapacityError(version.name, numel * self._pool.arena.element_size(), self._pool.total_bytes)

    def take_in(self, version: AdapterVersion, adapter: LoadedAdapter, answers: Answers) -> None:
        """A version's weights came from disk, or were made. Another name may have brought the same ones already."""
        self.loads += not isinstance(version, Mix)
        self._cache.pop(adapter.digest)  # read although it was there: whoever asked wanted to see the files
        self._store.identify(version, adapter.digest)
        version.summary = adapter.layout.summary
        version.untried = adapter.has_golden and not version.admitted
        version.warn(adapter.warnings)
        self._identified(version)
        resident = self._pool.find(adapter.digest)
        if resident is not None and resident.open:
            self.arrive(version, resident, answers)
        elif version.waiters:
            self._wait_for_room(version, adapter, answers)
        else:
            version.loading = version.provisional = False
            self.keep(adapter)

    def _serve_in_place(self, answers: Answers) -> bool:
        """Whether somebody could be served, or sent away, without moving anything."""
        for position, placement in enumerate(self._queue):
            resident = self._pool.find(placement.digest)
            if resident is not None and resident.open:  # it was to leave, but may stay after all
                self._queue.remove(placement)
                for version in placement.versions:
                    self.arrive(version, resident, answers)
                return True
            may_be_hopeless = resident is None and (position == 0 or placement.held_back)
            if may_be_hopeless and self._send_hopeless_away(placement, answers):
                return True
        return False

    def _send_hopeless_away(self, placement: Placement, answers: Answers) -> bool:
        """Whether there were some: others were pinned meanwhile. One content may be within the share of one name."""
        problems = [(version, self._never_fits(version, placement.numel)) for version in placement.versions]
        for version, problem in problems:
            if problem is not None:
                placement.versions.remove(version)
                self.fail(version, problem, answers)
        if not placement.versions:
            self._take_out(placement)
        return any(problem for _, problem in problems)

    def _on_read(self, version: AdapterVersion, read: Future[LoadedAdapter]) -> None:
        if read.cancelled():
            return
        log_if_unexpected(version.name, read.exception())
        with self._answering() as answers:
            del self._reading[version]
            self.wake(answers)
            if self._closed:
                return
            if self._store.alias_of(version) is not None:
                self.end_read(version, read, answers)
            self._read_more(answers)

    def end_read(self, version: AdapterVersion, read: Future[LoadedAdapter], answers: Answers) -> None:
        """Its weights are there, or never will be."""
        if (error := read.exception()) is not None:
            self.fail(version, error, answers)
            return
        try:
            self._take_in_or_tell(version, read.result(), answers)
        except Exception as bug:  # ours: whoever waits has to hear of it, or would for ever wait
            log.exception("taking in adapter %r failed", version.name)
            self.fail(version, bug, answers)

    def _take_in_or_tell(self, version: AdapterVersion, adapter: LoadedAdapter, answers: Answers) -> None:
        if version.digest in ("", adapter.digest):
            self.take_in(version, adapter, answers)
        else:
            self._changed(version, adapter, answers)

    def _pump(self) -> None:
        """In the placer: move adapters in until the next one has to wait, and then prepare for those that will come."""
        self._called.clear()
        while (move := self._next_move()) is not None:
            placement, window = move
            try:
                for victim in window.victims:
                    self._evict(victim)
                for step in window.moves:
                    self._shift(step.owner, step.offset)
                self._place(placement, window)
            except BaseException:
                self._let_stay(window)
                raise
        rest_s = REST_S
        while not (self._called.wait(rest_s) or self._closed) and self._pool.touch_ahead():
            cores_are_wanted = self._pool.transfer.is_busy or self._reading  # of a moment ago: the lock is not held
            rest_s = BUSY_REST_S if cores_are_wanted else 0.0

    def _next_move(self) -> tuple[Placement, Window[Resident]] | None:
        with self._answering() as answers:
            move = self._queue.pick()
            while move is None and self._serve_in_place(answers):
                move = self._queue.pick()
            self._is_awake = move is not None
            if not self._closed:
                self._read_more(answers)
            return move

    def _let_stay(self, window: Window[Resident]) -> None:
        """Whoever was to leave or to move and is there as before."""
        with self._answering():
            for resident in window.disturbed:
                if self._pool.find(resident.layout.digest) is resident:
                    resident.leaving = resident.draining = False

    @contextmanager
    def _given_up_on_error(self, resident: Resident) -> Iterator[None]:
        """What a move that fails leaves behind is not known: nobody may find it, and only zeroed room is used again."""
        try:
            yield
        except BaseException:
            with self._answering():
                if self._pool.find(resident.layout.digest) is resident:
                    self._pool.withdraw(resident)
                resident.leaving = True
                self._moved_all(resident.layout.digest)
            self.erase(resident)
            raise

    def _evict(self, victim: Resident) -> None:
        adapter = self._pool.read(victim)
        with self._given_up_on_error(victim):
            self._pool.clear(victim)
        with self._answering():
            self._pool.withdraw(victim)
            self._pool.release(victim)
            self.evictions += 1
            self._moved_all(adapter.digest)
            placement = self._queue.find(adapter.digest)
            if placement is not None:
                placement.adapter = adapter
            else:
                self.keep(adapter)

    def _shift(self, resident: Resident, offset: int) -> None:
        """To another place in the pool, through host memory: the two may overlap, and clearing waits for the steps."""
        adapter = self._pool.read(resident)
        with self._given_up_on_error(resident):
            self._pool.clear(resident)
            with self._answering():
                self._pool.relocate(resident, offset)
            self._pool.fill(resident, adapter)
        with self._answering() as answers:
            self.moves += 1
            resident.leaving = resident.draining = False
            self._moved_all(adapter.digest)
            placement = self._queue.find(adapter.digest)
            if placement is not None:
                self._queue.remove(placement)
            self._settle(resident, placement.versions if placement is not None else (), answers)

    def _place(self, placement: Placement, window: Window[Resident]) -> None:
        assert placement.adapter is not None
        for version in tuple(placement.versions):
            version.way.reach(Station.COPY)
        with self._answering():
            resident = self._pool.reserve(placement.adapter.layout, window.offset)
        try:
            with self._given_up_on_error(resident):
                self._pool.fill(resident, placement.adapter)
        except Exception as error:
            if not out_of_memory(error):
                raise
            self._leave_out(placement)
            return
        with self._answering() as answers:
            self._pool.publish(resident)
            self._queue.remove(placement)
            self.placements += 1
            self._moved_all(placement.digest)
            self._settle(resident, placement.versions, answers)

    def _leave_out(self, placement: Placement) -> None:
        """Memory ran out while it moved in: its room is others' already, and nothing of it stays."""
        with self._answering() as answers:
            self._queue.remove(placement)
            for version in placement.versions:
                self.fail(version, MemoryShortageError(f"adapter {version.name!r} was loaded"), answers)

    def _settle(self, resident: Resident, versions: Sequence[AdapterVersion], answers: Answers) -> None:
        """It is there, for these versions. Unless every name of it was unloaded meanwhile: then it has to go."""
        self.refresh_pin(resident)
        for version in versions:
            self.arrive(version, resident, answers)
        if not self._store.sharing(resident.layout.digest):
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
                for version in placement.versions:
                    self.fail(version, error, answers)


def _nothing() -> None:
    """For whoever waits for what is done before it."""


def _stand_in_turn(turns: Turns[Item], item: Item, waiters: Iterable[Waiter]) -> None:
    for waiter in waiters:
        turns.add(item, waiter.tenant, waiter.weight)


def log_if_unexpected(name: str, error: BaseException | None) -> None:
    if error is not None and not isinstance(error, GraloraError):
        log.error("loading adapter %r failed", name, exc_info=error)
