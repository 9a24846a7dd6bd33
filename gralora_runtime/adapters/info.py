"""What the adapter manager tells about itself: plain values for lists, answers and gauges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.checkpoint.header import AdapterSummary
from gralora_runtime.observation.histogram import HistogramCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionInfo:
    """One version of an adapter as an operator sees it."""

    number: int
    digest: str  # "" until it was first read
    state: AdapterState
    pinned: bool
    in_flight: int
    created_s: float  # seconds since the epoch
    last_used_s: float
    error: str
    warnings: tuple[str, ...]  # what is odd about it, though it is served


@dataclass(frozen=True, slots=True)
class CanaryInfo:
    """The version that gets a share of a name's requests."""

    number: int
    share: float  # 0 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """One adapter as an operator sees it: its name, and the version that the name stands for."""

    name: str
    version: int
    state: AdapterState
    digest: str  # "" until it was first loaded
    source: str  # directory
    pinned: bool
    in_flight: int  # requests that hold it or wait for it
    last_used_s: float  # seconds since the epoch; 0: never
    pool_bytes: int  # what it takes in the pool, there or not; 0: unknown
    error: str  # why the last attempt to load it failed, or that its files are gone; "": neither
    warnings: tuple[str, ...]  # what is odd about it, though it is served; of its weights once they were read
    summary: AdapterSummary | None  # None: its header could not be read
    previous: int  # the version that a rollback returns to; 0: none
    follows: bool  # new content of its source is promoted by itself
    canary: CanaryInfo | None
    versions: tuple[VersionInfo, ...]  # by number


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPage:
    """Some of a list, by name."""

    adapters: tuple[AdapterInfo, ...]
    next_after: str  # where the next page begins; "": this is the last one
    total: int  # names that the list's prefix fits


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadResult:
    """What unloading a name freed; nothing where another name has the same content."""

    name: str
    digest: str
    pool_bytes_freed: int
    host_bytes_freed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStats:
    """Gauges and counters of the pool and the cache behind it."""

    adapters: int
    leases: int
    waiting: int  # requests whose adapter is not there yet
    slots_used: int
    slots_total: int
    pool_bytes_used: int
    pool_bytes_total: int
    host_bytes_used: int
    host_bytes_total: int
    loads: int  # from disk
    load_failures: int
    load_s: HistogramCounts  # reading, checking and packing, one adapter each, the failures among them
    placements: int  # into the pool, from disk or host memory
    evictions: int
    moves: int  # within the pool, to make one long range of free ones


@dataclass(frozen=True, slots=True)
class Residence:
    """An adapter in memory. Names with the same content share one place, and each is told its whole size."""

    name: str
    version: int
    state: AdapterState  # RESIDENT or HOST
    bytes: int


@dataclass(frozen=True, slots=True)
class AdapterResidency:
    """Where the catalogue's adapters are."""

    counts: Mapping[AdapterState, int]  # every state
    residences: tuple[Residence, ...]  # at most as many as were asked for
