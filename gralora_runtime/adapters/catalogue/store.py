"""What is registered: names, the versions behind each, and which of them share content. Knows not where bytes are.

A name stands for one version at a time, the promoted one; a canary may have a share of its requests. Whoever names a
version by its number or its content gets that one. No torch.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from gralora_runtime.adapters.catalogue.names import Reference, numbered, summed
from gralora_runtime.adapters.catalogue.numerics import Numerics
from gralora_runtime.adapters.catalogue.quarantine import Quarantine
from gralora_runtime.adapters.checkpoint.header import AdapterSummary, files_stamp
from gralora_runtime.errors import AdapterNotFoundError, AdapterRejectedError, AdapterVersionNotFoundError
from gralora_runtime.observation.adapter_way import AdapterWait, AdapterWay

log = logging.getLogger(__name__)

GONE = "its files are gone"
NO_FILES = Path()  # what a mix is read from
MAX_SEEN = 8  # directories of one name whose stamps are remembered


class AdapterState(StrEnum):
    """Where an adapter is."""

    REGISTERED = "registered"  # on disk
    LOADING = "loading"  # being read, or waiting for room in the pool
    HOST = "host"  # evicted from the pool, still in host memory
    RESIDENT = "resident"  # in the pool
    FAILED = "failed"  # the last load failed; the next request tries again


@dataclass(slots=True, eq=False, kw_only=True)
class Waiter:
    """Somebody who waits until an adapter is in the pool: a request, which then wants a lease, or an operator."""

    future: Future[Any]
    wants_lease: bool
    pin: bool = False
    patient: bool = False  # everybody else's load goes first
    tenant: str = ""  # whose request it is; "": an operator's, or there are no tenants
    weight: float = 1.0  # of the tenant
    reference: Reference | None = None  # of a request: what it asked for
    version: AdapterVersion | None = None  # in whose line it stands
    wait: AdapterWait = field(default_factory=AdapterWait)  # is told on which load
    again: Callable[[], None] | None = None  # picks anew, once, what it asked for: what was picked has other files now


@dataclass(slots=True, eq=False, kw_only=True)
class AdapterVersion:
    """One content that a name has had, or has, and who uses it. What it is, is known when it was first read."""

    name: str
    number: int
    source: Path  # the directory that it is, or was, read from
    roots: tuple[Path, ...]  # links in it may end below these
    summary: AdapterSummary | None = None
    digest: str = ""  # set by `AdapterStore.identify`, once
    copy: Path | None = None  # in the content store: what it was, whatever becomes of its source
    offered: bool = False  # to the content store, since the server began
    stamp: object = None  # of its source's files, if it was last read from there
    created_s: float = field(default_factory=time.time)
    warnings: tuple[str, ...] | None = None  # what is odd about its content; None: nobody has read it since the start
    error: BaseException | None = None  # why the last attempt failed
    refused: tuple[tuple[Path, object], AdapterRejectedError] | None = None  # directory and stamp of its files, and why
    quarantine: Quarantine = field(default_factory=Quarantine)
    numerics: Numerics | None = None  # None: its last answer was a good one
    untried: bool = False  # golden prompts lie beside its files, and nobody gets it before it has answered them
    admitted: bool = False  # it has: once, for as long as the server lives
    provisional: bool = False  # registered by a load that has not succeeded yet: forgotten if it fails
    loading: bool = False
    pinned: bool = False  # this version, whatever the name stands for
    leases: int = 0
    waiters: list[Waiter] = field(default_factory=list)
    way: AdapterWay = field(default_factory=AdapterWay)  # of its newest load
    last_used_s: float = 0.0  # seconds since the epoch; 0: never
    mixes: list[Mix] = field(default_factory=list)  # that it is a part of

    @property
    def in_flight(self) -> int:
        return self.leases + len(self.waiters) + sum(mix.in_flight for mix in self.mixes)

    @property
    def members(self) -> tuple[AdapterVersion, ...]:
        """What is used when this is: itself, and of a mix what it is made of."""
        return (self,)

    @property
    def label(self) -> str:
        return numbered(self.name, self.number)

    def begin_way(self) -> None:
        """It is loaded, for all who wait for it and come until it is there."""
        self.way = AdapterWay()
        for waiter in self.waiters:
            waiter.wait.way = self.way

    def warn(self, warnings: tuple[str, ...]) -> None:
        """Its content was read, and this is odd about it. The log says it once, however often it is read."""
        if self.warnings is None and warnings:
            log.warning("%s: %s", self.label, "; ".join(warnings))
        self.warnings = warnings

    @property
    def place(self) -> tuple[Path, tuple[Path, ...]]:
        """The directory to read it from, and where links in it may end."""
        return (self.source, self.roots) if self.copy is None else (self.copy, (self.copy,))


Parts = tuple[tuple[AdapterVersion, float], ...]  # versions and their weights


@dataclass(slots=True, eq=False, kw_only=True)
class Mix(AdapterVersion):
    """The weighted sum of versions: a content that is made and not read, and that no name stands for."""

    parts: Parts

    @property
    def members(self) -> tuple[AdapterVersion, ...]:
        return tuple(dict.fromkeys(version for version, _ in self.parts))

    @property
    def label(self) -> str:
        return summed((version.label, weight) for version, weight in self.parts)

    @property
    def refusal(self) -> AdapterRejectedError | None:
        """Why there can be no such sum, whoever asks again. What is wrong with a part may be mended."""
        error = self.error
        return error if isinstance(error, AdapterRejectedError) and error.name == self.name else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A version that gets a share of a name's requests before it is promoted."""

    number: int
    share: float  # 0 to 1

    def takes(self, name: str, key: str) -> bool:
        """The same answer for the same key, as long as the version stays: a customer's user does not flap."""
        drawn = hashlib.blake2b(f"{name}\0{self.number}\0{key}".encode(), digest_size=8).digest()
        return int.from_bytes(drawn) < self.share * 2**64


@dataclass(slots=True, eq=False, kw_only=True)
class Alias:
    """A name, and the versions that it has had."""

    name: str
    follows: bool = True  # new content of its source is promoted by itself
    versions: dict[int, AdapterVersion] = field(default_factory=dict)  # by number, ascending
    promoted: int = 0  # 0: none yet
    previous: int = 0  # what a rollback returns to
    newest: int = 0  # the version whose content the source had when it was last read
    on_trial: int = 0  # the source has this one by now, but its golden prompts are not answered; 0: none
    last_number: int = 0  # the highest that was ever given: a number never means two contents
    seen: dict[str, object] = field(
        default_factory=dict
    )  # by directory: the stamp of its files when they were last read
    canary: Canary | None = None
    pinned: bool = False  # whichever version is promoted
    error: BaseException | None = None  # why the source's newest files do not serve
    quarantine: Quarantine = field(default_factory=Quarantine)  # of these files
    was_unloaded: bool = False  # by an operator, before the load that brings it back
    gone: bool = False  # no source has it any more: served from what is left of it, as long as anything is
    refreshing: bool = False  # its files are being read anew
    again: bool = False  # they changed meanwhile

    @property
    def current(self) -> AdapterVersion:
        """The version that the name stands for."""
        return self.versions[self.promoted]

    @property
    def in_source(self) -> int:
        """The version whose content its source has, whether that may serve or not."""
        return self.on_trial or self.newest

    @property
    def is_known(self) -> bool:
        """Somebody has read one of its versions."""
        return any(version.digest for version in self.versions.values())

    @property
    def last_read(self) -> int:
        """The highest number that has meant a content. One that nobody has read may mean any, also the next time."""
        return self.last_number if self.is_known else self.last_number - 1

    @property
    def latest(self) -> AdapterVersion:
        """What its source had when it was last read; what it stands for, if an operator removed that."""
        return self.versions.get(self.newest, self.current)

    def has_seen(self, directory: Path) -> bool:
        """Nothing has happened to the files there since they were last read."""
        stamp = self.seen.get(str(directory))
        return stamp is not None and stamp == files_stamp(directory)

    def note_seen(self, directory: Path, stamp: object) -> bool:
        """Whether that is news."""
        before = self.seen.pop(str(directory), None)
        self.seen[str(directory)] = stamp
        while len(self.seen) > MAX_SEEN:
            del self.seen[next(iter(self.seen))]
        return before != stamp

    @property
    def in_flight(self) -> int:
        return sum(version.in_flight for version in self.versions.values())

    def select(self, reference: Reference, key: str) -> AdapterVersion:
        """The version that a request gets. One whose content nobody has read yet may be any content."""
        if reference.number is not None:
            found = self.versions.get(reference.number)
        elif reference.digest:
            ordered = sorted(self.versions.values(), key=lambda version: version.digest == "")
            found = next((v for v in ordered if v.digest.startswith(reference.digest) or not v.digest), None)
        elif self.canary is not None and self.canary.takes(self.name, key):
            found = self.versions[self.canary.number]
        else:
            found = self.current
        if found is None:
            raise self.lacks(reference)
        return found

    def lacks(self, reference: Reference) -> AdapterVersionNotFoundError:
        wanted = f"sha256:{reference.digest}" if reference.digest else str(reference.number)
        return AdapterVersionNotFoundError(self.name, wanted, tuple(self.versions))

    def keeps_pinned(self, version: AdapterVersion) -> bool:
        return version.pinned or (self.pinned and version.number == self.promoted)


class AdapterStore:
    """Aliases by name, versions by content. Looking up a name that is not there leaves no trace."""

    def __init__(self) -> None:
        self._aliases: dict[str, Alias] = {}
        self._mixes: dict[Parts, Mix] = {}
        self._by_digest: dict[str, dict[AdapterVersion, None]] = {}  # a dictionary keeps the order of arrival

    def __len__(self) -> int:
        return len(self._aliases)

    def aliases(self) -> Iterator[Alias]:
        return iter(self._aliases.values())

    def names(self) -> Iterator[str]:
        return iter(self._aliases)

    def versions(self) -> Iterator[AdapterVersion]:
        return (version for alias in self._aliases.values() for version in alias.versions.values())

    @property
    def num_mixes(self) -> int:
        return len(self._mixes)

    def mixes(self) -> Iterator[Mix]:
        return iter(self._mixes.values())

    def mix(self, parts: Parts) -> Mix:
        """The one of these parts, whatever their order, which begins to be if there is none yet."""
        parts = tuple(sorted(parts, key=lambda part: (part[0].name, part[0].number, part[1])))
        mix = self._mixes.get(parts)
        if mix is None:
            name = summed((version.name, weight) for version, weight in parts)
            mix = self._mixes[parts] = Mix(name=name, number=0, source=NO_FILES, roots=(), parts=parts)
            for version in mix.members:
                version.mixes.append(mix)
        return mix

    def remove_mix(self, mix: Mix) -> None:
        del self._mixes[mix.parts]
        for version in mix.members:
            version.mixes.remove(mix)
        self._unfile(mix)

    def find(self, name: str) -> Alias | None:
        return self._aliases.get(name)

    def get(self, name: str) -> Alias:
        alias = self._aliases.get(name)
        if alias is None:
            raise AdapterNotFoundError(name)
        return alias

    def alias_of(self, version: AdapterVersion) -> Alias | None:
        """None: it was removed."""
        alias = self._aliases.get(version.name)
        return alias if alias is not None and alias.versions.get(version.number) is version else None

    def add(self, alias: Alias) -> None:
        assert alias.name not in self._aliases, alias.name
        self._aliases[alias.name] = alias
        for version in alias.versions.values():
            self._file(version)

    def add_version(self, alias: Alias, version: AdapterVersion) -> None:
        assert version.number not in alias.versions, version.label
        alias.versions[version.number] = version
        self._file(version)

    def remove(self, alias: Alias) -> None:
        del self._aliases[alias.name]
        for version in alias.versions.values():
            self._unfile(version)

    def remove_version(self, alias: Alias, version: AdapterVersion) -> None:
        del alias.versions[version.number]
        self._unfile(version)

    def identify(self, version: AdapterVersion, digest: str) -> None:
        """From now on it is known what this version is, and that never changes."""
        assert version.digest in ("", digest), version.label
        version.digest = digest
        self._file(version)

    def sharing(self, digest: str) -> tuple[AdapterVersion, ...]:
        """The versions whose content is this one, of any name."""
        return tuple(self._by_digest.get(digest, ()))

    def pinned(self, digest: str) -> bool:
        """Whether any name keeps this content in the pool."""
        return any(
            alias.keeps_pinned(version)
            for version in self._by_digest.get(digest, ())
            if (alias := self.alias_of(version)) is not None
        )

    def _file(self, version: AdapterVersion) -> None:
        if version.digest:
            self._by_digest.setdefault(version.digest, {})[version] = None

    def _unfile(self, version: AdapterVersion) -> None:
        sharing = self._by_digest.get(version.digest)
        if sharing is not None:
            sharing.pop(version, None)
            if not sharing:
                del self._by_digest[version.digest]
