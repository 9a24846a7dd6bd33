"""What the catalogue must not forget: names, their versions, which is promoted, pinned, last used. Kept in SQLite.

Knows neither torch nor the pool, and not why anything changes.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from gralora_runtime.adapters.catalogue.database import FILE, blaming, open_file, open_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRow:
    """One content that a name has had."""

    name: str
    number: int  # from 1
    digest: str
    source: str  # the directory it was read from
    stored: bool  # a copy lies in the content store
    pinned: bool
    created_s: float  # seconds since the epoch
    last_used_s: float  # the same; 0: never
    error: str  # why the last attempt failed; empty: it did not


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRow:
    """One name, and which of its versions serve it."""

    name: str
    current: int | None  # number of the promoted version
    previous: int | None  # what a rollback returns to
    newest: int | None  # what its source had when it was last read
    last_number: int  # the highest that was ever given to a version
    seen: str  # JSON: by directory, the stamp of its files when they were last read
    canary: int | None
    canary_share: float  # of requests, 0 to 1
    pinned: bool
    unloaded: bool  # an operator removed it: not found again by itself until it is loaded
    versions: tuple[VersionRow, ...] = ()  # by number


_SAVE_NAME = """
    INSERT OR REPLACE INTO names
        (name, current, previous, newest, last_number, seen, canary, canary_share, pinned, unloaded)
    VALUES (:name, :current, :previous, :newest, :last_number, :seen, :canary, :canary_share, :pinned, :unloaded)
"""
_SAVE_VERSION = """
    INSERT OR REPLACE INTO versions (name, number, digest, source, stored, pinned, created_s, last_used_s, error)
    VALUES (:name, :number, :digest, :source, :stored, :pinned, :created_s, :last_used_s, :error)
"""
_NAMES = """
    SELECT name, current, previous, newest, last_number, seen, canary, canary_share, pinned, unloaded
    FROM names ORDER BY name
"""
_VERSIONS = "SELECT name, number, digest, source, stored, pinned, created_s, last_used_s, error FROM versions"
_IN_ORDER = f"{_VERSIONS} ORDER BY name, number"
_OF_DIGEST = f"{_VERSIONS} WHERE digest = ? ORDER BY name, number"
_TOUCH = "UPDATE versions SET last_used_s = ? WHERE name = ? AND number = ?"


class Journal:
    """The rows, from any thread. What changes them has reached the disk when it returns, or raised and changed none."""

    def __init__(self, connection: sqlite3.Connection, path: Path | str, lock_file: FileLock | None) -> None:
        self._connection = connection
        self._path = path
        self._lock_file = lock_file
        self._lock = threading.RLock()  # a transaction holds it around the methods called within

    @classmethod
    def open(cls, folder: Path | None) -> Journal:
        """The catalogue in that directory, or one in memory. Raises `CatalogueError` for one that cannot be trusted."""
        if folder is None:
            return cls(open_memory(), ":memory:", None)
        connection, lock_file = open_file(folder)
        return cls(connection, folder / FILE, lock_file)

    def names(self) -> tuple[NameRow, ...]:
        """All of them, with their versions."""
        versions: defaultdict[str, list[VersionRow]] = defaultdict(list)
        with self._lock, blaming(self._path):
            for row in self._connection.execute(_IN_ORDER):
                versions[row[0]].append(_version(row))
            return tuple(_name(row, versions[row[0]]) for row in self._connection.execute(_NAMES))

    def versions_of(self, digest: str) -> tuple[VersionRow, ...]:
        """The versions, of whatever names, that have this content."""
        with self._lock, blaming(self._path):
            return tuple(map(_version, self._connection.execute(_OF_DIGEST, (digest,))))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is changed within happens together, or not at all if anything raises. One within another joins it."""
        with self._lock, nullcontext() if self._connection.in_transaction else self._outermost():
            yield

    def save_name(self, row: NameRow) -> None:
        """Insert or replace the name's own fields; its versions stay as they are."""
        fields = {field: getattr(row, field) for field in row.__slots__ if field != "versions"}
        with self.transaction():
            self._execute(_SAVE_NAME, fields)

    def save_version(self, row: VersionRow) -> None:
        """Insert or replace a version of a name that is there, or will be when the transaction ends."""
        fields = {field: getattr(row, field) for field in row.__slots__}
        with self.transaction():
            self._execute(_SAVE_VERSION, fields | {"source": _bytes(row.source), "error": _bytes(row.error)})

    def remove_version(self, name: str, number: int) -> None:
        """Nothing, if it is not there. No name may point at it when the transaction ends."""
        with self.transaction():
            self._execute("DELETE FROM versions WHERE name = ? AND number = ?", (name, number))

    def remove_name(self, name: str) -> None:
        """And its versions. Nothing, if it is not there."""
        with self.transaction():
            self._execute("DELETE FROM versions WHERE name = ?", (name,))
            self._execute("DELETE FROM names WHERE name = ?", (name,))

    def touch(self, uses: Mapping[tuple[str, int], float]) -> None:
        """When versions, by name and number, were last used; those removed meanwhile are passed over.

        Cheaper than the others, because it does not wait for the disk: a killed process loses nothing of it, a power
        cut may take the newest. For no transaction's inside.
        """
        with self._lock:
            assert not self._connection.in_transaction, "SQLite changes no safety level within a transaction"
            self._execute("PRAGMA synchronous = NORMAL")
            try:
                with self.transaction(), blaming(self._path):
                    self._connection.executemany(_TOUCH, ((at_s, *key) for key, at_s in uses.items()))
            finally:
                self._execute("PRAGMA synchronous = FULL")

    def close(self) -> None:
        """Also gives the file to whoever wants it next."""
        with self._lock:
            self._connection.close()
            if self._lock_file is not None:
                self._lock_file.release()

    @contextmanager
    def _outermost(self) -> Iterator[None]:
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
            self._execute("COMMIT")
        finally:
            if self._connection.in_transaction:  # SQLite has ended it by itself if the disk is full
                self._execute("ROLLBACK")

    def _execute(self, statement: str, values: Mapping[str, Any] | tuple[Any, ...] = ()) -> None:
        with blaming(self._path):
            self._connection.execute(statement, values)


def _name(row: tuple[Any, ...], versions: Iterable[VersionRow]) -> NameRow:
    name, current, previous, newest, last_number, seen, canary, canary_share, pinned, unloaded = row
    return NameRow(
        name=name,
        current=current,
        previous=previous,
        newest=newest,
        last_number=last_number,
        seen=seen,
        canary=canary,
        canary_share=canary_share,
        pinned=bool(pinned),
        unloaded=bool(unloaded),
        versions=tuple(versions),
    )


def _version(row: tuple[Any, ...]) -> VersionRow:
    name, number, digest, source, stored, pinned, created_s, last_used_s, error = row
    return VersionRow(
        name=name,
        number=number,
        digest=digest,
        source=_text(source),
        stored=bool(stored),
        pinned=bool(pinned),
        created_s=created_s,
        last_used_s=last_used_s,
        error=_text(error),
    )


def _bytes(text: str) -> bytes:
    """Of any text: a path, or an error that quotes one, may hold half a character."""
    return text.encode("utf-8", errors="surrogatepass")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="surrogatepass")
