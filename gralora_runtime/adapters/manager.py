"""The only part of the adapter code that the rest of the runtime talks to: names in, leases out, from any thread.

Reading from disk, moving weights and zeroing are the mover's, in its threads; which version a name stands for is the
catalogue's to say. The lock is held for bookkeeping only.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gralora_kernels.packing import ROW_MAJOR, Packing
from gralora_runtime.adapters.admission import Admission, Examiner
from gralora_runtime.adapters.answers import Answers
from gralora_runtime.adapters.catalogue.catalogue import RETENTION, Catalogue, Retention
from gralora_runtime.adapters.catalogue.changes import Changes, any_name
from gralora_runtime.adapters.catalogue.names import Reference, check_name, is_mix, parse_reference, version_of
from gralora_runtime.adapters.catalogue.numerics import Numerics
from gralora_runtime.adapters.catalogue.similar import similar_name
from gralora_runtime.adapters.catalogue.sources.source import Source
from gralora_runtime.adapters.catalogue.store import AdapterState, AdapterStore, AdapterVersion, Alias, Mix, Waiter
from gralora_runtime.adapters.catalogue.uploads import Uploads
from gralora_runtime.adapters.checkpoint.affine import BaseLayers
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter
from gralora_runtime.adapters.checkpoint.spec import ModuleShape, to_keep
from gralora_runtime.adapters.descriptions import Descriptions
from gralora_runtime.adapters.discovery import Discovery
from gralora_runtime.adapters.housekeeping import Housekeeping
from gralora_runtime.adapters.info import AdapterInfo, AdapterPage, AdapterResidency, AdapterStats, UnloadResult
from gralora_runtime.adapters.mixing import Mixing
from gralora_runtime.adapters.oddities import Oddities
from gralora_runtime.adapters.persistence import Persistence
from gralora_runtime.adapters.residency.eviction import worth_after_use
from gralora_runtime.adapters.residency.host_cache import HostCache
from gralora_runtime.adapters.residency.lease import BASE_LEASE, AdapterLease
from gralora_runtime.adapters.residency.mover import Mover, log_if_unexpected
from gralora_runtime.adapters.residency.pool import AdapterPool, Resident
from gralora_runtime.adapters.residency.share import ShareOf
from gralora_runtime.adapters.residency.transfer import Transfer
from gralora_runtime.adapters.watch import AdapterWatch
from gralora_runtime.errors import AdapterBusyError, DrainingError, GraloraError, InvalidRequestError
from gralora_runtime.observation.adapter_way import AdapterWait, Station
from gralora_runtime.request import ServedAdapter, WeightedAdapter

log = logging.getLogger(__name__)


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
        sources: Sequence[Source] = (),
        base_model: str,
        base_norms: Mapping[str, float],
        base_layers: BaseLayers | None = None,
        max_width: int,
        allowed_keys: Collection[str] = (),
        packing: Packing = ROW_MAJOR,
        transfer: Transfer | None = None,
        retention: Retention = RETENTION,
        watch: str = "off",
        state_dir: Path | None = None,
        copies_bytes: int = 20 << 30,
        vocab_size: int = 0,
        known_tokens: int = 0,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`watch`, `state_dir`, `copies_bytes`: see `EngineConfig`. Raises CatalogueError.

        `base_norms`: see `Oddities`. `base_layers`: for adapters with magnitudes or biases. `allowed_keys`: see
        `parse_config`. `known_tokens`: see `checkpoint.loader.load`. `vocab_size`: the base model's, or 0. If there is
        one, golden prompts count, and somebody has to call `examine_with`.
        """
        self.pool = AdapterPool(
            modules=modules,
            device=device,
            dtype=dtype,
            pool_bytes=pool_bytes,
            max_slots=max_slots,
            packing=packing,
            transfer=transfer,
        )
        self.base_model = base_model
        self.uploads = next((source for source in sources if isinstance(source, Uploads)), None)
        self._lock = threading.Lock()
        self._store = AdapterStore()
        self._persistence = Persistence(state_dir, copies_bytes=copies_bytes, store=self._store)
        self._changes = Changes()
        self._removed: list[AdapterVersion] = []  # whose memory nobody has given back yet
        self._catalogue = Catalogue(self._store, retention, self._on_changed, self._removed.append, now_s)
        self._cache = HostCache(host_cache_bytes, self._on_dropped)
        self._leases: dict[int, tuple[AdapterVersion, Resident]] = {}  # by serial
        self._serials = itertools.count(1)
        self._clock = itertools.count(1)  # orders uses of residents
        self._closed = False
        self._admission = Admission(vocab_size=vocab_size, acquire=self._lease_for_trial, decided=self._on_tried)
        self._warming = 0  # elements of the pool that were asked for at start
        oddities = Oddities(
            base_model=base_model, base_norms=base_norms, modules=tuple(modules), allowed_keys=allowed_keys
        )
        self._mover = Mover(
            pool=self.pool,
            store=self._store,
            cache=self._cache,
            modules=modules,
            max_width=max_width,
            base_layers=base_layers,
            allowed_keys=allowed_keys,
            answering=self._answering,
            serve=self._serve,
            changed=self._on_files_changed,
            forget=self._forget_provisional,
            moved=self._touch,
            make=self._make,
            identified=self.identified,
            examine=self._examine,
            vocab_size=vocab_size,
            known_tokens=known_tokens,
            oddities=oddities,
        )
        self._mixing = Mixing(
            store=self._store,
            cache=self._cache,
            mover=self._mover,
            household=self,
            answering=self._answering,
            modules=modules,
            max_width=max_width,
            packing=self.pool.packing,
        )
        self._descriptions = Descriptions(self._lock, self._store, self.pool, self._cache, oddities)
        self._discovery = Discovery(
            sources=sources,
            store=self._store,
            catalogue=self._catalogue,
            answering=self._answering,
            read=self._mover.fetch,
            household=self,
            persistence=self._persistence,
            modules=modules,
            max_width=max_width,
            allowed_keys=allowed_keys,
            vocab_size=vocab_size,
            keeps_16_bit=self.pool.packing.keeps_16_bit,
            element_bytes=dtype.itemsize,
            watch=watch,
        )
        self._discovery.begin()
        with self._answering() as answers:
            self._mover.wake(answers)  # nobody waits yet, but there is something to prepare
        self._housekeeping = Housekeeping(self.tidy)

    # For requests.

    def acquire(
        self, adapter: str, key: str = "", *, tenant: str = "", weight: float = 1.0, wait: AdapterWait | None = None
    ) -> Future[AdapterLease]:
        """A lease on the adapter, once it is in the pool. Cancelling the future withdraws the wish.

        `adapter`: see `parse_reference`. Requests of one `key` all get the canary, or none of them does.
        `tenant`: whose turn it takes where adapters wait to be loaded; "": that of all who name none. `wait`: is told
        of the load that the future waits for.
        """
        waiter = Waiter(future=Future(), wants_lease=True, tenant=tenant, weight=weight, wait=wait or AdapterWait())
        if adapter == "":
            waiter.future.set_result(BASE_LEASE)
            return waiter.future
        waiter.reference = parse_reference("adapter", adapter)
        with self._answering() as answers:
            self._refuse_when_closed()
            version = self.pick(waiter.reference, key, answers)
            if version is not None:
                return self.enter(version, waiter, answers)
        self._discovery.request(waiter.reference.name, key, waiter)
        return waiter.future

    def acquire_mix(
        self,
        adapters: Sequence[WeightedAdapter],
        key: str = "",
        *,
        tenant: str = "",
        weight: float = 1.0,
        wait: AdapterWait | None = None,
    ) -> Future[AdapterLease]:
        """A lease on the sum of adapters, each times its weight, as `acquire` gives one on one of them.

        What each name stands for is picked now, or when somebody first finds it. One adapter named twice counts twice.
        """
        if len(adapters) == 1 and adapters[0].weight == 1:
            return self.acquire(adapters[0].adapter, key, tenant=tenant, weight=weight, wait=wait)
        wanted = [(parse_reference(f"adapters[{at}].name", one.adapter), one.weight) for at, one in enumerate(adapters)]
        waiter = Waiter(future=Future(), wants_lease=True, tenant=tenant, weight=weight, wait=wait or AdapterWait())
        with self._answering() as answers:
            self._refuse_when_closed()
            self._mixing.request(wanted, key, waiter, answers)
        return waiter.future

    def release(self, lease: AdapterLease) -> None:
        """Give a lease back, exactly once."""
        if lease.slot == BASE_LEASE.slot:
            return
        with self._answering() as answers:
            self.take_back(lease, answers)

    def abandon(self, acquired: Future[AdapterLease]) -> None:
        """Give up an `acquire`, answered or not. For a task that was cancelled and cannot know which of the two."""
        if not acquired.cancel():
            acquired.add_done_callback(self._release_answer)

    def limit_pool(self, share_of: ShareOf) -> None:
        """Who owns which names, and how much of the pool its adapters may take. Who is there already may stay."""
        with self._answering() as answers:
            self._mover.shares.share_of = share_of
            self._mover.wake(answers)

    def note_answer(self, label: str, problem: str = "") -> None:
        """How a request ended that this version, or mix, served: well, or with logits that are no numbers, the
        `problem`."""
        with self._lock:
            version = self._labelled(label)
            if version is None:
                return  # removed since
            if not problem:
                version.numerics = None
                return
            version.numerics = version.numerics or Numerics()
            if version.numerics.fail(problem):
                log.warning("%s", version.numerics.error(label))

    def await_memory(self, timeout_s: float) -> None:
        """Until memory for the first adapters is written, which they would have to wait for; no longer than this."""
        self._mover.await_memory(timeout_s)

    def examine_with(self, examiner: Examiner) -> None:
        """Who answers golden prompts. Versions that have some wait until somebody does."""
        self._admission.examine_with(examiner)

    # For operators.

    def load(self, name: str, path: Path | None = None, *, pin: bool = False) -> Future[AdapterInfo]:
        """Find the adapter in the sources, or at `path` in one of them, read it anew and bring it into the pool.

        Content that the name has not had is a new version, which is promoted unless its source waits for that.
        """
        check_name("name", name)
        waiter = Waiter(future=Future(), wants_lease=False, pin=pin)
        with self._lock:
            self._refuse_when_closed()
        self._discovery.load(name, path, waiter)
        return waiter.future

    def refresh(self, name: str) -> None:
        """Files of this name came or changed. From any thread; what follows is not waited for."""
        self._discovery.refresh(name)

    def unload(self, name: str) -> UnloadResult:
        """Forget a name and all its versions, or one version that it does not stand for.

        Weights go too, and leave zeros, unless another name has the same content. No request brings the name back.
        """
        reference = parse_reference("name", name)
        with self._answering() as answers:
            alias = self._store.get(reference.name)
            version = alias.select(reference, "")
            if version.number == alias.promoted and reference.is_exact and len(alias.versions) > 1:
                raise InvalidRequestError("name", name, "is the promoted version: promote another one first")
            whole = not reference.is_exact or len(alias.versions) == 1
            in_flight = alias.in_flight if whole else version.in_flight
            if in_flight:
                raise AdapterBusyError(name, in_flight)
            if whole:
                self._discovery.forget(alias)
            else:
                self._catalogue.remove_version(alias, version)
            pool_bytes, host_bytes = self._give_back(answers)
        self._persistence.flush()
        return UnloadResult(name=name, digest=version.digest, pool_bytes_freed=pool_bytes, host_bytes_freed=host_bytes)

    def pin(self, name: str, pinned: bool) -> AdapterInfo:
        """Keep an adapter in the pool, or no longer: whatever the name stands for, or one version.

        One that is not there is loaded in the background.
        """
        reference = parse_reference("name", name)
        with self._answering() as answers:
            self._refuse_when_closed()
            alias = self._store.get(reference.name)
            version = alias.select(reference, "")
            resident = self.pool.find(version.digest)
            if pinned and resident is None and (problem := self._mover.capacity_problem(version)):
                raise problem
            if reference.is_exact:
                version.pinned = pinned
            else:
                alias.pinned = pinned
            self._on_changed(alias)
            if not (alias.is_known or alias.pinned):  # only its pin was remembered
                self._persistence.depart(alias.name, alias.last_read)
            info = self.settle(alias, answers)
        self._persistence.flush()
        return info

    def promote(self, name: str, version: str = "") -> AdapterInfo:
        """Let a name stand for one of its versions ("3", "sha256:..."), or for its newest. Streams end on theirs."""
        check_name("name", name)
        reference = version_of(name, version) if version else None
        with self._answering() as answers:
            self._refuse_when_closed()
            alias = self._store.get(name)
            self._catalogue.promote(alias, reference or Reference(name=name, number=alias.newest))
            info = self.settle(alias, answers)
        self._persistence.flush()
        return info

    def roll_back(self, name: str) -> AdapterInfo:
        """Let a name stand for what it stood for before its last promotion."""
        check_name("name", name)
        with self._answering() as answers:
            self._refuse_when_closed()
            alias = self._store.get(name)
            self._catalogue.roll_back(alias)
            info = self.settle(alias, answers)
        self._persistence.flush()
        return info

    def set_canary(self, name: str, version: str, share: float) -> AdapterInfo:
        """Give a version a share of the name's requests, 0 to 1. 0 ends it."""
        check_name("name", name)
        reference = version_of(name, version) if share else Reference(name=name)
        with self._answering() as answers:
            self._refuse_when_closed()
            alias = self._store.get(name)
            self._catalogue.set_canary(alias, reference, share)
            info = self.settle(alias, answers)
        self._persistence.flush()
        return info

    def get(self, name: str) -> AdapterInfo:
        check_name("name", name)
        with self._lock:
            return self._descriptions.info(self._store.get(name))

    def list(self) -> tuple[AdapterInfo, ...]:
        """All adapters by name. The lock is not held while thousands of them are described."""
        return self._descriptions.all()

    def page(
        self,
        *,
        size: int,
        after: str = "",
        prefix: str = "",
        states: Collection[AdapterState] = (),
        sees: Callable[[str], bool] = any_name,
    ) -> AdapterPage:
        """At most `size` adapters by name: those behind `after` that begin with `prefix` and are in one of `states`.

        No states: in any. `sees`: which names there are for whoever asks.
        """
        return self._descriptions.page(size=size, after=after, prefix=prefix, states=states, sees=sees)

    def watch(self, prefix: str, wake: Callable[[], None], sees: Callable[[str], bool] = any_name) -> AdapterWatch:
        """Hear of all adapters whose names begin so, and then of each change. Close it when done.

        `wake` is called from any thread, when there is something to `take` after there was nothing. `sees`: as in
        `page`, and called from any thread, too.
        """
        listener = self._changes.listen(prefix, wake, sees)
        with self._lock:
            names = tuple(self._store.names())
        seen = sorted(name for name in names if name.startswith(prefix) and sees(name))
        return AdapterWatch(seen, listener, self._changes, self._descriptions.find)

    def similar(self, name: str, sees: Callable[[str], bool]) -> str:
        """The registered name that is nearest, of those that whoever asks sees; "" if none is near."""
        with self._lock:
            names = tuple(self._store.names())
        return similar_name(name, filter(sees, names))

    def residency(self, limit: int, first: Collection[str] = ()) -> AdapterResidency:
        """Where all adapters are, and by name at most `limit` that are in memory: `first`, then the last used ones."""
        return self._descriptions.residency(limit, first)

    def tidy(self) -> None:
        """Give up what was kept for long enough. The lock is not held while thousands of names are gone through."""
        with self._lock:
            aliases = tuple(self._store.aliases())
        for alias in aliases:
            with self._answering() as answers:
                if self._closed:
                    return
                if len(alias.versions) > 1 and self._store.find(alias.name) is alias:
                    self._catalogue.prune(alias)
                    self._give_back(answers)
            if alias.gone:
                self._discovery.give_up_if_nothing_is_left(alias)
        with self._answering() as answers:
            self._forget_mixes(self._mixing.unused(), answers)
        if self.uploads is not None:
            self.uploads.prune(alias.name for alias in aliases)

    def flush(self) -> None:
        """Return when all that happened until now would survive a kill, or raise CatalogueError."""
        self._persistence.flush()

    def reads(self, folder: Path) -> bool:
        """Whether somebody is reading, or waits to read, a version from there."""
        with self._lock:
            return any(version.loading and version.source == folder for version in self._store.versions())

    def has_version_at(self, folder: Path) -> bool:
        """Whether a version is, or will be again, read from there."""
        with self._lock:
            return any(version.source == folder for version in self._store.versions())

    def stats(self) -> AdapterStats:
        with self._lock:
            return AdapterStats(
                adapters=len(self._store),
                leases=len(self._leases),
                waiting=sum(len(version.waiters) for version in self._contents()),
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
                moves=self._mover.moves,
            )

    def check_integrity(self) -> None:
        """Every slot, element and lease is accounted for once, at any moment; raises AssertionError when not."""
        with self._lock:
            self.pool.check_integrity()
            self._cache.check_integrity()
            of_versions = sum(version.leases for version in self._contents())
            assert self.pool.num_leases == of_versions == len(self._leases), "leases"
            assert not self._removed, "versions were removed and their memory kept"
            for version, resident in self._leases.values():
                assert self.pool.find(version.digest) is resident, f"a lease on {version.label} lost its slot"
            for alias in self._store.aliases():
                assert alias.promoted in alias.versions, f"{alias.name} stands for no version"
            for version in self._contents():
                assert version.loading or not version.waiters, f"{version.label} has waiters and nobody loads it"
                resident_or_none = self.pool.find(version.digest)
                both = resident_or_none is not None and version.digest in self._cache
                assert not both, f"{version.label} is in the pool and in the cache"

    def close(self) -> None:
        """Answer everybody who waits, and stop the threads."""
        self._housekeeping.close()
        with self._answering() as answers:
            self._closed = True
            self._discovery.stop()
            self._mixing.close()
            self._mover.close(answers)
        self._discovery.close()
        self._mover.join()
        self._admission.close()
        self._persistence.close()

    # Below: with the lock held, but for those that take it.

    @contextmanager
    def _answering(self) -> Iterator[Answers]:
        """Takes the lock; what was decided under it is delivered after it."""
        answers = Answers(self.release)
        try:
            with self._lock:
                yield answers
        finally:
            answers.deliver()

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise DrainingError

    def enter(self, version: AdapterVersion, waiter: Waiter, answers: Answers) -> Future[Any]:
        """Serve the waiter at once, or let it wait for a load that is under way or begins now."""
        if waiter.wants_lease and (bad := _unfit(version)):
            answers.error(waiter.future, bad)
            return waiter.future
        if version.untried and version.error is not None and version.quarantine.lasts:
            answers.error(waiter.future, version.error)
            return waiter.future
        resident = self.pool.find(version.digest)
        if resident is not None and resident.open:
            self._serve_tried(version, resident, waiter, answers)
            return waiter.future
        if self._is_gone(version):
            answers.later(partial(self._discovery.find_again, version, waiter))
            return waiter.future
        self._stand_in_line(version, waiter, answers)
        if not version.loading:
            version.begin_way()
            self._mover.start(version, answers)
        elif not waiter.patient:
            self._mover.hurry(version, waiter)
            self._admission.hurry(version, waiter)
            if isinstance(version, Mix):
                self._mixing.hurry(version, waiter)
        return waiter.future

    def pick(self, reference: Reference, key: str, answers: Answers) -> AdapterVersion | None:
        """The version that a request gets now; None: nobody knows the name yet."""
        alias = self._store.find(reference.name)
        if alias is None:
            return None
        self._try_newest_again(alias, answers)
        return alias.select(reference, key)

    def find_out(self, reference: Reference, key: str, waiter: Waiter, answers: Answers) -> None:
        answers.later(partial(self._discovery.request, reference.name, key, waiter))

    def _make(self, mix: Mix, answers: Answers) -> None:
        self._mixing.begin(mix, answers)

    def _forget_mixes(self, mixes: Iterable[Mix], answers: Answers) -> None:
        for mix in mixes:
            self._store.remove_mix(mix)
            self._removed.append(mix)
        self._give_back(answers)

    def _contents(self) -> Iterator[AdapterVersion]:
        """Everything that somebody may have a lease on."""
        return itertools.chain(self._store.versions(), self._store.mixes())

    def _labelled(self, label: str) -> AdapterVersion | None:
        """Unless it was removed since."""
        if is_mix(label):
            return next((mix for mix in self._store.mixes() if mix.label == label), None)
        reference = parse_reference("adapter", label)
        alias = self._store.find(reference.name)
        return alias.versions.get(reference.number or 0) if alias is not None else None

    def _is_gone(self, version: AdapterVersion) -> bool:
        """There is nothing left to read it from. A look at a directory, for cold adapters only."""
        if version.loading or not version.digest or version.digest in self._cache or self.pool.find(version.digest):
            return False
        if isinstance(version, Mix):  # which is made again, of whatever is left of its parts
            return False
        return not version.place[0].is_dir()

    def _serve_tried(self, version: AdapterVersion, resident: Resident, waiter: Waiter, answers: Answers) -> None:
        if not version.untried:
            self._serve(version, resident, waiter, answers)
            return
        self._stand_in_line(version, waiter, answers)
        if not version.loading:
            version.begin_way()
            version.loading, version.error = True, None
            self._examine(version, resident, answers)
        else:
            self._admission.hurry(version, waiter)

    def _serve(self, version: AdapterVersion, resident: Resident, waiter: Waiter, answers: Answers) -> None:
        resident.worth = worth_after_use(resident.worth, next(self._clock))
        if isinstance(version, Mix):
            self._note_use(version)
            answers.result(waiter.future, self._grant(version, resident))
            return
        alias = self._store.get(version.name)
        if waiter.reference is not None and not resident.layout.digest.startswith(waiter.reference.digest):
            answers.error(waiter.future, alias.lacks(waiter.reference))
            return
        if waiter.wants_lease:
            self._note_use(version)
        if waiter.pin:
            alias.pinned = True
            self._on_changed(alias)
            self._mover.refresh_pin(resident)
        if not waiter.wants_lease:
            answers.result(waiter.future, self._descriptions.info(alias))
            return
        answers.result(waiter.future, self._grant(version, resident))

    def _note_use(self, version: AdapterVersion) -> None:
        for used in version.members:
            used.last_used_s = time.time()
            self._persistence.used(used)

    def _grant(self, version: AdapterVersion, resident: Resident) -> AdapterLease:
        lease = AdapterLease(
            name=version.name,
            version=version.number,
            digest=resident.layout.digest,
            slot=resident.slot,
            generation=resident.generation,
            width=resident.layout.width,
            serial=next(self._serials),
            num_bytes=self._pool_bytes(resident.layout.numel),
            parts=_served(version),
            invocation=resident.layout.summary.invocation,
            added_tokens=resident.layout.summary.added_tokens,
            own_tokens=resident.layout.own_tokens,
        )
        self._leases[lease.serial] = (version, resident)
        version.leases += 1
        resident.leases += 1
        self._touch(version)
        return lease

    def held(self, lease: AdapterLease) -> tuple[AdapterVersion, Resident]:
        """Of whom a lease is, and where it lies."""
        return self._leases[lease.serial]

    def take_back(self, lease: AdapterLease, answers: Answers) -> tuple[AdapterVersion, Resident]:
        held = self._leases.pop(lease.serial, None)
        if held is None:
            raise RuntimeError(f"{lease} is not held: it was released before")
        version, resident = held
        version.leases -= 1
        resident.leases -= 1
        self._touch(version)
        if isinstance(version, Mix) and any(self._store.alias_of(one) is None for one in version.members):
            self._forget_mixes([version] if self._mixing.is_unused(version) else [], answers)
        if resident.leases == 0 and self._mover.num_waiting:
            self._mover.wake(answers)
        return held

    def _examine(self, version: AdapterVersion, resident: Resident, answers: Answers) -> None:
        """It is there. Who waits for it goes on waiting until it has answered its golden prompts."""
        if not self._closed:
            version.way.reach(Station.TRIAL)
            held = self._grant(version, resident)
            answers.later(partial(self._admission.begin, version, held, tuple(version.waiters)))

    def _lease_for_trial(self, version: AdapterVersion) -> AdapterLease:
        with self._lock:
            resident = self.pool.find(version.digest)
            assert resident is not None, f"{version.label} is being tried and lost its slot"
            return self._grant(version, resident)

    def _on_tried(self, version: AdapterVersion, held: AdapterLease, error: BaseException | None) -> None:
        """In the thread of trials."""
        log_if_unexpected(version.name, error)
        with self._answering() as answers:
            _, resident = self.take_back(held, answers)
            alias = self._store.alias_of(version)
            if alias is None or self._closed:
                return
            if error is None:
                self._catalogue.admit(alias, version)
                self.identified(version)
                self._mover.arrive(version, resident, answers)
                self.settle(alias, answers)
            else:
                log.warning("%s: %s", version.label, error)
                self._catalogue.refuse(alias, version, to_keep(error))
                self.fail(version, error, answers)

    def _on_brought_to_try(self, version: AdapterVersion, brought: Future[Any]) -> None:
        """Without the lock. It may not even have come into the pool."""
        error = None if brought.cancelled() else brought.exception()
        with self._lock:
            alias = self._store.alias_of(version)
            if error is not None and alias is not None and not self._closed:
                self._catalogue.refuse(alias, version, error)

    def _try_newest_again(self, alias: Alias, answers: Answers) -> None:
        """What its source has by now could not be served. Somebody uses the name, so it may be worth another try."""
        if alias.error is not None and not (alias.quarantine.lasts or alias.refreshing):
            alias.quarantine.extend()
            answers.later(partial(self._discovery.refresh, alias.name))

    def settle(self, alias: Alias, answers: Answers) -> AdapterInfo:
        """After the catalogue changed what a name stands for."""
        self._keep_pins(alias, answers)
        self._give_back(answers)
        return self._descriptions.info(alias)

    def _keep_pins(self, alias: Alias, answers: Answers) -> None:
        """Residents are pinned as the catalogue says now, and what is pinned and not there is brought."""
        for version in tuple(alias.versions.values()):
            resident = self.pool.find(version.digest)
            if resident is not None:
                self._mover.refresh_pin(resident)
            if alias.keeps_pinned(version) and (resident is None or resident.leaving) and not version.loading:
                self.enter(version, Waiter(future=Future(), wants_lease=False), answers)
        self._mover.wake(answers)

    def _give_back(self, answers: Answers) -> tuple[int, int]:
        """Memory and copies of removed versions, unless others have their content.

        Returns bytes of the pool, of the cache.
        """
        pool_bytes = host_bytes = 0
        for mix in {mix for version in self._removed for mix in version.mixes if self._mixing.is_unused(mix)}:
            self._store.remove_mix(mix)
            self._removed.append(mix)
        self._persistence.drop_unused_copies(version.digest for version in self._removed if version.digest)
        for version in self._removed:
            resident = self.pool.find(version.digest)
            if self._store.sharing(version.digest):
                if resident is not None:
                    self._mover.refresh_pin(resident)
                continue
            cached = self._cache.pop(version.digest)
            host_bytes += cached.num_bytes if cached else 0
            if resident is not None:
                pool_bytes += self._pool_bytes(resident.layout.numel)
                if not resident.leaving:
                    self.pool.withdraw(resident)
                    answers.later(partial(self._mover.erase, resident))
        if self._removed:
            self._mover.wake(answers)
        self._removed.clear()
        return pool_bytes, host_bytes

    def _touch(self, version: AdapterVersion) -> None:
        """Something is different about its weights, or about who uses them."""
        for one in version.members:
            self._changes.touch(one.name)

    def _on_changed(self, alias: Alias) -> None:
        """What the catalogue says of a name is different now."""
        self._changes.touch(alias.name)
        if self._store.find(alias.name) is alias:
            self._persistence.note(alias)

    def _on_dropped(self, digest: str) -> None:
        """The host cache had no room for it any more."""
        for version in self._store.sharing(digest):
            self._touch(version)

    def bring(
        self, version: AdapterVersion, adapter: LoadedAdapter, waiters: Sequence[Waiter], answers: Answers
    ) -> None:
        """Weights that were read for this version go where somebody waits for them, or into the host cache."""
        if version.untried and not waiters:
            waiters = [Waiter(future=Future(), wants_lease=False)]
            waiters[0].future.add_done_callback(partial(self._on_brought_to_try, version))
        for waiter in waiters:
            self._stand_in_line(version, waiter, answers)
        if waiters and not version.loading:
            version.loading = True
            self._mover.take_in(version, adapter, answers)
        else:
            self._mover.keep(adapter)

    def bring_idle(self, version: AdapterVersion, answers: Answers) -> bool:
        """Only into room that is free: nothing leaves for what may not be asked for."""
        self._warming += version.summary.packed_numel if version.summary else 0
        if self._warming > self.pool.ranges.numel or self.pool.num_free_slots == 0:
            return False
        if self.pool.find(version.digest) is None and not version.loading:
            self.enter(version, Waiter(future=Future(), wants_lease=False, patient=True), answers)
        return True

    def capacity_problem(self, version: AdapterVersion) -> GraloraError | None:
        return self._mover.capacity_problem(version)

    def holds(self, version: AdapterVersion) -> bool:
        here = version.digest in self._cache or self.pool.find(version.digest) is not None
        return here or version.loading or version.in_flight > 0

    def fail(self, version: AdapterVersion, error: BaseException, answers: Answers) -> None:
        self._mover.fail(version, error, answers)

    def _on_files_changed(self, version: AdapterVersion, adapter: LoadedAdapter, answers: Answers) -> None:
        self._discovery.on_files_changed(version, adapter, answers)

    def identified(self, version: AdapterVersion) -> None:
        alias = self._store.alias_of(version)
        # One that is on trial is looked at anew by the next start, if it is not decided by then.
        if alias is None or not version.stamp or version.untried:
            return
        # An adapter that only comes back from the disk is written down and copied no second time.
        is_new = alias.note_seen(version.source, version.stamp)
        if is_new:
            self._persistence.note(alias)
        if is_new or not version.offered:  # the server before this one may have been killed before it had copied it
            version.offered = True
            self._persistence.keep_copy(version, self._on_copied)

    def _on_copied(self, digest: str, copy: Path) -> None:
        """In the content store's thread."""
        with self._lock:
            for version in self._store.sharing(digest):
                version.copy = copy
                self._on_changed(self._store.get(version.name))

    def _stand_in_line(self, version: AdapterVersion, waiter: Waiter, answers: Answers) -> None:
        if waiter.version is None:
            answers.later(partial(waiter.future.add_done_callback, partial(self._on_answered, waiter)))
        waiter.version = version
        version.waiters.append(waiter)
        waiter.wait.way = version.way

    def _forget_provisional(self, version: AdapterVersion, answers: Answers) -> None:
        alias = self._store.alias_of(version)
        if alias is not None:
            self._discovery.take_back(alias, answers)

    def _pool_bytes(self, numel: int) -> int:
        return numel * self.pool.arena.element_size()

    def _on_answered(self, waiter: Waiter, future: Future[Any]) -> None:
        """When it was cancelled rather than answered: nobody waits there any more."""
        if not future.cancelled():
            return
        with self._answering() as answers:
            version = waiter.version
            if version is not None and waiter in version.waiters:
                version.waiters.remove(waiter)
                if not version.waiters:
                    self._mover.forget(version, answers)

    def _release_answer(self, acquired: Future[AdapterLease]) -> None:
        if not acquired.cancelled() and acquired.exception() is None:
            self.release(acquired.result())


def _unfit(version: AdapterVersion) -> GraloraError | None:
    """Why nobody gets it now, though its weights may be there: answers of late, its own and of what it is made of."""
    for one in dict.fromkeys((version, *version.members)):
        if one.numerics is not None and (bad := one.numerics.error(one.label)):
            return bad
    return version.refusal if isinstance(version, Mix) else None


def _served(version: AdapterVersion) -> tuple[ServedAdapter, ...]:
    if not isinstance(version, Mix):
        return ()
    return tuple(
        ServedAdapter(name=one.name, version=one.number, digest=one.digest, weight=weight)
        for one, weight in version.parts
    )
