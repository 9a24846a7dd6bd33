"""Tells what a manager's adapters are and where they are: for lists, answers and gauges. Changes nothing."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection

from gralora_runtime.adapters.catalogue.store import GONE, AdapterState, AdapterStore, AdapterVersion, Alias
from gralora_runtime.adapters.info import (
    AdapterInfo,
    AdapterPage,
    AdapterResidency,
    CanaryInfo,
    Residence,
    VersionInfo,
)
from gralora_runtime.adapters.oddities import Oddities
from gralora_runtime.adapters.residency.host_cache import HostCache
from gralora_runtime.adapters.residency.pool import AdapterPool


class Descriptions:
    """`info` and `state` are called with the lock held; the others take it, never while thousands are described."""

    def __init__(
        self, lock: threading.Lock, store: AdapterStore, pool: AdapterPool, cache: HostCache, oddities: Oddities
    ) -> None:
        self._lock = lock
        self._store = store
        self._pool = pool
        self._cache = cache
        self._oddities = oddities

    def info(self, alias: Alias, *, with_versions: bool = True) -> AdapterInfo:
        version = alias.current
        error = version.error or alias.error
        return AdapterInfo(
            name=alias.name,
            version=version.number,
            state=self.state(version),
            digest=version.digest,
            source=str(version.source),
            pinned=alias.keeps_pinned(version),
            in_flight=alias.in_flight,
            last_used_s=max(v.last_used_s for v in alias.versions.values()),
            pool_bytes=self._pool_bytes(version),
            error=GONE if alias.gone else str(error) if error else "",
            warnings=self._warnings(version),
            summary=version.summary,
            previous=alias.previous,
            follows=alias.follows,
            canary=CanaryInfo(alias.canary.number, alias.canary.share) if alias.canary else None,
            versions=tuple(self._version_info(alias, v) for v in alias.versions.values()) if with_versions else (),
        )

    def state(self, version: AdapterVersion) -> AdapterState:
        resident = self._pool.find(version.digest)
        if resident is not None and not resident.leaving and not version.untried:
            return AdapterState.RESIDENT
        if version.loading:
            return AdapterState.LOADING
        if version.error is not None:
            return AdapterState.FAILED
        return AdapterState.HOST if version.digest in self._cache or resident else AdapterState.REGISTERED

    def find(self, name: str) -> AdapterInfo | None:
        """If it is still there."""
        with self._lock:
            alias = self._store.find(name)
            return None if alias is None else self.info(alias)

    def all(self) -> tuple[AdapterInfo, ...]:
        """By name."""
        return tuple(info for name in sorted(self._names()) if (info := self._listed(name)) is not None)

    def page(
        self, *, size: int, after: str, prefix: str, states: Collection[AdapterState], sees: Callable[[str], bool]
    ) -> AdapterPage:
        """See `AdapterManager.page`."""
        names = sorted(name for name in self._names() if name.startswith(prefix) and sees(name))
        found: list[AdapterInfo] = []
        for name in names[bisect_right(names, after) :]:
            info = self._listed(name, states)
            if info is not None and len(found) == size:
                return AdapterPage(adapters=tuple(found), next_after=found[-1].name, total=len(names))
            if info is not None:
                found.append(info)
        return AdapterPage(adapters=tuple(found), next_after="", total=len(names))

    def residency(self, limit: int, first: Collection[str]) -> AdapterResidency:
        """See `AdapterManager.residency`."""
        with self._lock:
            currents = tuple(alias.current for alias in self._store.aliases())
        states = [(version, self.state(version)) for version in currents]
        here = [(v, state) for v, state in states if state in (AdapterState.RESIDENT, AdapterState.HOST)]
        here.sort(key=lambda found: (found[0].name not in first, -found[0].last_used_s, found[0].name))
        counts = Counter(state for _, state in states)
        return AdapterResidency(
            {state: counts[state] for state in AdapterState},
            tuple(
                Residence(version.name, version.number, state, self._pool_bytes(version))
                for version, state in here[:limit]
                if version.summary is not None
            ),
        )

    def _names(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._store.names())

    def _listed(self, name: str, states: Collection[AdapterState] = ()) -> AdapterInfo | None:
        """If it is still there, and in one of the states, if there are any; without its versions."""
        with self._lock:
            alias = self._store.find(name)
            if alias is None or (states and self.state(alias.current) not in states):
                return None
            return self.info(alias, with_versions=False)

    def _version_info(self, alias: Alias, version: AdapterVersion) -> VersionInfo:
        return VersionInfo(
            number=version.number,
            digest=version.digest,
            state=self.state(version),
            pinned=alias.keeps_pinned(version),
            in_flight=version.in_flight,
            created_s=version.created_s,
            last_used_s=version.last_used_s,
            error=str(version.error) if version.error else "",
            warnings=self._warnings(version),
        )

    def _warnings(self, version: AdapterVersion) -> tuple[str, ...]:
        """What its headers alone say, until somebody has read it."""
        if version.warnings is not None:
            return version.warnings
        return self._oddities.of_header(version.summary) if version.summary else ()

    def _pool_bytes(self, version: AdapterVersion) -> int:
        return version.summary.packed_numel * self._pool.arena.element_size() if version.summary else 0
