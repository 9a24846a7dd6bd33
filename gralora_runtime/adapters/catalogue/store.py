"""The catalogue: one record per adapter name, one index. Knows what is registered, not where it is. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from gralora_runtime.adapters.checkpoint.header import AdapterSummary
from gralora_runtime.errors import AdapterNotFoundError, AdapterRejectedError


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


@dataclass(slots=True, eq=False, kw_only=True)
class AdapterRecord:
    """All that is known about one name."""

    name: str
    source: Path
    summary: AdapterSummary | None = None
    digest: str = ""  # of what was last loaded; a name keeps its content until it is unloaded
    error: BaseException | None = None  # why the last attempt failed
    refused: tuple[tuple[Path, object], AdapterRejectedError] | None = None  # directory and stamp of its files, and why
    provisional: bool = False  # registered by a load that has not succeeded yet: forgotten if it fails
    loading: bool = False
    pinned: bool = False
    leases: int = 0
    waiters: list[Waiter] = field(default_factory=list)
    last_used_s: float = 0.0  # seconds since the epoch; 0: never

    @property
    def in_flight(self) -> int:
        return self.leases + len(self.waiters)


class AdapterStore:
    """Records by name. Looking up a name that is not there leaves no trace."""

    def __init__(self) -> None:
        self._records: dict[str, AdapterRecord] = {}

    def __iter__(self) -> Iterator[AdapterRecord]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: AdapterRecord) -> None:
        assert record.name not in self._records, record.name
        self._records[record.name] = record

    def find(self, name: str) -> AdapterRecord | None:
        return self._records.get(name)

    def get(self, name: str) -> AdapterRecord:
        record = self._records.get(name)
        if record is None:
            raise AdapterNotFoundError(name)
        return record

    def remove(self, record: AdapterRecord) -> None:
        del self._records[record.name]

    def sharing(self, digest: str) -> Iterator[AdapterRecord]:
        """The records whose content is this one."""
        return (record for record in self._records.values() if record.digest == digest)
