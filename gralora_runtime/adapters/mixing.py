"""Sums of adapters: which there are, and how one is made of its parts. Knows no files, nor what becomes of the sum.

A part comes as for a request of its own, so its golden prompts, its quarantine and its owner's share count. It is
copied out of the pool and let go of at once, so that whoever waits for room holds none. Parts in host memory are used
where they lie. The sum is made in a reader's thread, and is then an adapter like any other.

Methods that take `Answers` are called with the manager's lock held; the others are called back, and take it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from gralora_kernels.packing import Packing
from gralora_runtime.adapters.answers import Answers
from gralora_runtime.adapters.catalogue.names import Reference, as_float32
from gralora_runtime.adapters.catalogue.store import AdapterStore, AdapterVersion, Mix, Parts, Waiter
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter
from gralora_runtime.adapters.checkpoint.mixture import Ingredient, mixed
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.residency.host_cache import HostCache
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.adapters.residency.mover import Mover, log_if_unexpected
from gralora_runtime.adapters.residency.pool import Resident
from gralora_runtime.adapters.turns import Turns
from gralora_runtime.errors import AdapterVersionLostError, DrainingError, GraloraError, MemoryShortageError
from gralora_runtime.shortage import out_of_memory

MAX_MAKING = 4  # at a time: copies of their parts lie in memory meanwhile
MAX_FORGOTTEN = 64  # mixes that nobody uses and no memory holds, before they are looked for

Wanted = Sequence[tuple[Reference, float]]  # what a request names, and the weights


class Household(Protocol):
    """What the manager does for mixes. Called with its lock held."""

    def enter(self, version: AdapterVersion, waiter: Waiter, answers: Answers) -> object:
        """Serve the waiter, or let it wait for the version."""

    def pick(self, reference: Reference, key: str, answers: Answers) -> AdapterVersion | None:
        """The version that a request gets now; None: nobody knows the name yet."""

    def find_out(self, reference: Reference, key: str, waiter: Waiter, answers: Answers) -> None:
        """Ask the sources for a name; the waiter gets a lease on what a request would get."""

    def held(self, lease: AdapterLease) -> tuple[AdapterVersion, Resident]:
        """Of whom a lease is, and where it lies."""

    def take_back(self, lease: AdapterLease, answers: Answers) -> object:
        """A lease is done with."""

    def holds(self, version: AdapterVersion) -> bool:
        """Its weights are in memory, or on their way there, or somebody waits for them."""
        ...


@dataclass(slots=True, eq=False)
class _Request:
    """For a mix, some of whose names nobody knew when it came."""

    weights: Sequence[float]
    waiter: Waiter
    picked: list[AdapterVersion | None]
    failed: bool = False


@dataclass(slots=True, eq=False)
class _Making:
    """A mix whose parts are being brought together."""

    mix: Mix
    found: dict[AdapterVersion, LoadedAdapter] = field(default_factory=dict)
    leases: list[Future[AdapterLease]] = field(default_factory=list)
    ended: bool = False


class Mixing:
    """All mixes of a manager."""

    def __init__(
        self,
        *,
        store: AdapterStore,
        cache: HostCache,
        mover: Mover,
        household: Household,
        answering: Callable[[], AbstractContextManager[Answers]],
        modules: Sequence[ModuleShape],
        max_width: int,
        packing: Packing,
    ) -> None:
        self._store = store
        self._cache = cache
        self._mover = mover
        self._household = household
        self._answering = answering  # takes the lock
        self._modules = tuple(modules)
        self._max_width = max_width
        self._packing = packing
        self._waiting: Turns[Mix] = Turns()
        self._making: dict[Mix, _Making] = {}
        self._look_at = MAX_FORGOTTEN  # as many mixes as this: some may be nobody's
        self._closed = False

    def request(self, wanted: Wanted, key: str, waiter: Waiter, answers: Answers) -> None:
        """The waiter gets a lease on the sum of what these names stand for now."""
        waiter.again = partial(self._request_again, wanted, key, waiter)
        self._request(wanted, key, waiter, answers)

    def begin(self, mix: Mix, answers: Answers) -> None:
        """Somebody waits for this mix, which is nowhere."""
        for waiter in mix.waiters:
            self._waiting.add(mix, waiter.tenant, waiter.weight)
        self._make_more(answers)

    def hurry(self, mix: Mix, waiter: Waiter) -> None:
        """Somebody more waits for it."""
        if mix in self._waiting:
            self._waiting.add(mix, waiter.tenant, waiter.weight)

    def unused(self) -> list[Mix]:
        """Mixes to forget: those that no memory holds, and those of which a part was removed."""
        return [mix for mix in self._store.mixes() if self.is_unused(mix)]

    def is_unused(self, mix: Mix) -> bool:
        if mix.loading or mix.in_flight:
            return False
        removed = any(self._store.alias_of(version) is None for version in mix.members)
        return removed or not self._household.holds(mix)

    def close(self) -> None:
        """Begin nothing more; who waits is told by the mover."""
        self._closed = True
        self._waiting.clear()

    def _request_again(self, wanted: Wanted, key: str, waiter: Waiter) -> None:
        with self._answering() as answers:
            if self._closed:
                answers.error(waiter.future, DrainingError())
            else:
                try:
                    self._request(wanted, key, waiter, answers)
                except GraloraError as error:  # the name is gone meanwhile
                    answers.error(waiter.future, error)

    def _request(self, wanted: Wanted, key: str, waiter: Waiter, answers: Answers) -> None:
        request = _Request(
            weights=tuple(as_float32(weight) for _, weight in wanted),
            waiter=waiter,
            picked=[self._household.pick(reference, key, answers) for reference, _ in wanted],
        )
        for at, (reference, _) in enumerate(wanted):
            if request.picked[at] is None:
                asking = Waiter(
                    future=Future(),
                    wants_lease=True,
                    tenant=waiter.tenant,
                    weight=waiter.weight,
                    reference=reference,
                )
                asking.future.add_done_callback(partial(self._on_found_out, request, at))
                self._household.find_out(reference, key, asking, answers)
        self._enter_if_known(request, answers)

    def _enter_if_known(self, request: _Request, answers: Answers) -> None:
        versions = [version for version in request.picked if version is not None]
        if len(versions) < len(request.weights):
            return
        self._forget_some()
        parts: Parts = tuple(zip(versions, request.weights, strict=True))
        self._household.enter(self._store.mix(parts), request.waiter, answers)

    def _forget_some(self) -> None:
        """Anybody can think of new weights, so what is not in memory leaves no trace for long."""
        if self._store.num_mixes >= self._look_at:
            for mix in self.unused():
                if not self._household.holds(mix):
                    self._store.remove_mix(mix)
            self._look_at = MAX_FORGOTTEN + 2 * self._store.num_mixes

    def _on_found_out(self, request: _Request, at: int, found: Future[AdapterLease]) -> None:
        with self._answering() as answers:
            if found.cancelled():
                return
            if (error := found.exception()) is not None:
                if not request.failed:
                    request.failed = True
                    answers.error(request.waiter.future, error)
                return
            request.picked[at], _ = self._household.held(found.result())
            if not request.failed:
                self._enter_if_known(request, answers)
            self._household.take_back(found.result(), answers)

    def _make_more(self, answers: Answers) -> None:
        while len(self._making) < MAX_MAKING and (mix := next(iter(self._waiting), None)) is not None:
            self._waiting.take(mix)
            if mix.waiters:
                self._gather(mix, answers)
            else:
                mix.loading = False

    def _gather(self, mix: Mix, answers: Answers) -> None:
        making = self._making[mix] = _Making(mix)
        first = mix.waiters[0]
        for version in mix.members:
            cached = self._cache.find(version.digest)
            if cached is not None and not (version.untried or version.loading):
                making.found[version] = cached
                continue
            # Of this very version: what its files hold by now may be another one's content.
            waiter = Waiter(
                future=Future(),
                wants_lease=True,
                tenant=first.tenant,
                weight=first.weight,
                reference=Reference(name=version.name, number=version.number),
            )
            making.leases.append(waiter.future)
            waiter.future.add_done_callback(partial(self._on_brought, making, version))
            self._household.enter(version, waiter, answers)
        self._add_up_if_complete(making, answers)

    def _on_brought(self, making: _Making, version: AdapterVersion, brought: Future[AdapterLease]) -> None:
        with self._answering() as answers:
            if brought.cancelled():
                return
            if (error := brought.exception()) is not None:
                self._give_up(making, error, answers)
            elif making.ended or self._closed:
                self._household.take_back(brought.result(), answers)
            else:
                lease = brought.result()
                copying = self._mover.copy(self._household.held(lease)[1])
                answers.later(partial(copying.add_done_callback, partial(self._on_copied, making, version, lease)))

    def _on_copied(
        self, making: _Making, version: AdapterVersion, lease: AdapterLease, copying: Future[LoadedAdapter]
    ) -> None:
        with self._answering() as answers:
            self._household.take_back(lease, answers)
            if copying.cancelled():
                return
            if (error := copying.exception()) is not None:
                self._give_up(making, error, answers)
                return
            making.found[version] = copying.result()
            self._add_up_if_complete(making, answers)
            self._mover.wake(answers)  # it prepared something, and was called away

    def _add_up_if_complete(self, making: _Making, answers: Answers) -> None:
        if making.ended or self._closed or len(making.found) < len(making.mix.members):
            return
        adding = self._mover.work(partial(self._add_up, making))
        answers.later(partial(adding.add_done_callback, partial(self._on_added_up, making)))

    def _add_up(self, making: _Making) -> LoadedAdapter:
        """In a reader."""
        mix, found = making.mix, making.found
        assert all(found[one].digest == one.digest for one in mix.members), f"{mix.label} would be of other content"
        ingredients = [Ingredient(found[version], weight) for version, weight in mix.parts]
        try:
            return mixed(mix.name, ingredients, self._modules, packing=self._packing, max_width=self._max_width)
        except Exception as error:
            if out_of_memory(error):
                raise MemoryShortageError(f"adapters {mix.name!r} were added up") from error
            raise

    def _on_added_up(self, making: _Making, adding: Future[LoadedAdapter]) -> None:
        if adding.cancelled():
            return
        log_if_unexpected(making.mix.label, adding.exception())
        with self._answering() as answers:
            self._end(making, answers)
            if not self._closed:
                self._mover.end_read(making.mix, adding, answers)

    def _give_up(self, making: _Making, error: BaseException, answers: Answers) -> None:
        """A part cannot be had."""
        if not making.ended:
            self._end(making, answers)
            for lease in making.leases:
                answers.later(lease.cancel)
            if isinstance(error, AdapterVersionLostError):
                self._pick_again(making.mix, answers)
            self._mover.fail(making.mix, error, answers)

    def _pick_again(self, mix: Mix, answers: Answers) -> None:
        """As whoever asks for a name alone gets what its files hold by now."""
        for waiter in tuple(mix.waiters):
            again, waiter.again = waiter.again, None
            if again is not None:
                mix.waiters.remove(waiter)
                answers.later(again)

    def _end(self, making: _Making, answers: Answers) -> None:
        making.ended = True
        del self._making[making.mix]
        if not self._closed:
            self._make_more(answers)
