"""`usage.sqlite`: the rows of `Usage` that outlive the server. Knows neither what they mean nor when to write them.

A row is written as it is then, not by what it grew, so nothing is counted twice however often a write is tried. One
process has the file: SQLite's own lock on it goes away with its holder, however that ends.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple
from pathlib import Path

from gralora_server.errors import UsageFileError
from gralora_server.tenants.usage import Counts, UsageRow

FILE = "usage.sqlite"
LOCK_WAIT_S = 1.0  # a server that is just ending may still have it
# What was released once never changes; another version needs statements that lead to it.
SCHEMA_VERSION = 1
SCHEMA = """
    CREATE TABLE usage (
        tenant TEXT NOT NULL,
        adapter TEXT NOT NULL,
        requests INTEGER NOT NULL CHECK (typeof(requests) = 'integer' AND requests >= 0),
        prompt_tokens INTEGER NOT NULL CHECK (typeof(prompt_tokens) = 'integer' AND prompt_tokens >= 0),
        cached_tokens INTEGER NOT NULL CHECK (typeof(cached_tokens) = 'integer' AND cached_tokens >= 0),
        output_tokens INTEGER NOT NULL CHECK (typeof(output_tokens) = 'integer' AND output_tokens >= 0),
        refused INTEGER NOT NULL CHECK (typeof(refused) = 'integer' AND refused >= 0),
        upload_bytes INTEGER NOT NULL CHECK (typeof(upload_bytes) = 'integer' AND upload_bytes >= 0),
        PRIMARY KEY (tenant, adapter)
    ) WITHOUT ROWID
"""
_ALL = """
    SELECT tenant, adapter, requests, prompt_tokens, cached_tokens, output_tokens, refused, upload_bytes FROM usage
"""
_SAVE = """
    INSERT OR REPLACE INTO usage
        (tenant, adapter, requests, prompt_tokens, cached_tokens, output_tokens, refused, upload_bytes)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""


class UsageFile:
    """Open until `close`. Methods may be called from any thread, and wait for the disk."""

    def __init__(self, folder: Path) -> None:
        """Made if there is none. Raises `UsageFileError` for one that cannot be had or trusted."""
        self._path = folder / FILE
        self._lock = threading.Lock()
        with self._blaming():
            folder.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                self._path, timeout=LOCK_WAIT_S, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def read(self) -> list[UsageRow]:
        with self._lock, self._blaming():
            return [UsageRow(row[0], row[1], Counts(*row[2:])) for row in self._connection.execute(_ALL)]

    def write(self, rows: Iterable[UsageRow]) -> None:
        """All of them are on the disk when it returns, or none is: raises `UsageFileError`."""
        values = [(row.tenant, row.adapter, *astuple(row.counts)) for row in rows]
        with self._lock, self._blaming(), self._transaction():
            self._connection.executemany(_SAVE, values)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _prepare(self) -> None:
        """When this returns, the file is sound, ours, of this version, and nobody else can open it."""
        self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._connection.execute("PRAGMA synchronous = FULL")
        (mode,) = self._connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise self._error("lies where SQLite can have no write-ahead log")
        with self._transaction():
            (found,) = self._connection.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                raise self._error(f"is damaged: {found}")
            self._build_if_new()

    def _build_if_new(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        with closing(self._connection.execute("SELECT name FROM sqlite_master")) as found:
            tables = [name for (name,) in found]
        if version == 0 and not tables:
            self._connection.execute(SCHEMA)
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version > SCHEMA_VERSION:
            raise self._error(f"was written by a newer server (its schema has version {version})")
        elif version != SCHEMA_VERSION or tables != ["usage"]:
            raise self._error("is another file (its tables are others)")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:  # SQLite has ended it by itself if the disk is full
                self._connection.execute("ROLLBACK")

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, OSError) as cause:
            raise self._error(f"cannot be read or written: {cause}") from cause

    def _error(self, problem: str) -> UsageFileError:
        return UsageFileError(str(self._path), problem)
