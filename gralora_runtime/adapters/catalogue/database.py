"""The SQLite file below the journal: made whole or not at all, held by one process, checked before it is believed.

Knows the tables, and not what is written into them.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from pathlib import Path

from filelock import FileLock, Timeout

from gralora_runtime.adapters.catalogue.durable import sync_directory
from gralora_runtime.errors import CatalogueError

FILE = "catalogue.sqlite"
LOCK = "catalogue.lock"
LOG_HEADER, LOG_MARK, LOG_VERSION = struct.Struct(">8I"), 0x377F0682, 3_007_000
MOVE_AWAY = f"move {FILE}* away: names then come anew from the sources"
SEE_TO_DISK = "see to the disk and to who may write there, then try again"

# The statements that lead from each version of the schema to the next; what was released once never changes.
# Paths, and errors that quote them, may hold what is no UTF-8, so they are BLOBs. SQLite takes texts for integers
# where no CHECK forbids it, and the check at the start reads these again. Rows that point at each other are compared
# when a transaction ends, so it may write them in any order, and replace them.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE names (
            name TEXT PRIMARY KEY NOT NULL,
            current INTEGER,
            previous INTEGER,
            newest INTEGER,
            last_number INTEGER NOT NULL CHECK (typeof(last_number) = 'integer' AND last_number >= 0),
            seen TEXT NOT NULL,
            canary INTEGER,
            canary_share REAL NOT NULL CHECK (typeof(canary_share) = 'real' AND canary_share BETWEEN 0 AND 1),
            pinned INTEGER NOT NULL CHECK (pinned IN (0, 1)),
            unloaded INTEGER NOT NULL CHECK (unloaded IN (0, 1)),
            FOREIGN KEY (name, current) REFERENCES versions DEFERRABLE INITIALLY DEFERRED,
            FOREIGN KEY (name, previous) REFERENCES versions DEFERRABLE INITIALLY DEFERRED,
            FOREIGN KEY (name, newest) REFERENCES versions DEFERRABLE INITIALLY DEFERRED,
            FOREIGN KEY (name, canary) REFERENCES versions DEFERRABLE INITIALLY DEFERRED
        ) WITHOUT ROWID
        """,
        """
        CREATE TABLE versions (
            name TEXT NOT NULL REFERENCES names DEFERRABLE INITIALLY DEFERRED,
            number INTEGER NOT NULL CHECK (typeof(number) = 'integer' AND number >= 1),
            digest TEXT NOT NULL,
            source BLOB NOT NULL,
            stored INTEGER NOT NULL CHECK (stored IN (0, 1)),
            pinned INTEGER NOT NULL CHECK (pinned IN (0, 1)),
            created_s REAL NOT NULL CHECK (typeof(created_s) = 'real'),
            last_used_s REAL NOT NULL CHECK (typeof(last_used_s) = 'real'),
            error BLOB NOT NULL,
            PRIMARY KEY (name, number)
        ) WITHOUT ROWID
        """,
        "CREATE INDEX versions_by_digest ON versions (digest)",
    ),
)


def open_file(folder: Path) -> tuple[sqlite3.Connection, FileLock]:
    """The catalogue in `folder`, made if there is none, and the lock that keeps other processes out of it."""
    path = folder / FILE
    with blaming(path), ExitStack() as undo:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(path)
        undo.callback(lock.release)
        _make_if_missing(path)
        _check_log(path)
        connection = _connect(path)
        undo.callback(connection.close)
        _check(connection, path)
        _write_ahead(connection, path)
        undo.pop_all()
    return connection, lock


def open_memory() -> sqlite3.Connection:
    """The same tables, for as long as the connection lives."""
    connection = _connect(":memory:")
    _build(connection)
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


@contextmanager
def blaming(path: Path | str) -> Iterator[None]:
    """What the disk or the file is to blame for becomes a `CatalogueError`; a row that breaks a rule is our bug."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise
    except (sqlite3.OperationalError, OSError) as cause:
        raise CatalogueError(str(path), f"cannot be read or written: {cause}", SEE_TO_DISK) from cause
    except (sqlite3.DatabaseError, UnicodeDecodeError) as cause:
        raise CatalogueError(str(path), f"is damaged: {cause}", MOVE_AWAY) from cause


def _take_lock(path: Path) -> FileLock:
    """The lock is the kernel's, so it goes away with its holder, however that ends."""
    lock = FileLock(path.with_name(LOCK), thread_local=False)  # whichever thread closes the journal gives it back
    try:
        lock.acquire(timeout=0)
    except Timeout as cause:
        remedy = "end that process, or give this one a state directory of its own"
        raise CatalogueError(str(path), "another process has it open", remedy) from cause
    return lock


def _make_if_missing(path: Path) -> None:
    """Under another name first: a file of this name is whole, so that an empty one is damage and no beginning."""
    if path.exists():
        return
    for rest in (path.with_name(f"{FILE}-wal"), path.with_name(f"{FILE}-journal")):
        if rest.exists():  # SQLite would play it into the new file
            remedy = f"bring it back, or {MOVE_AWAY}"
            raise CatalogueError(str(path), f"is missing, but its {rest.name} is there", remedy)
    new = path.with_name(f"{FILE}.new")
    new.unlink(missing_ok=True)  # of a process that was killed between here and the rename
    try:
        with closing(_connect(new)) as connection:
            connection.execute("PRAGMA journal_mode = OFF")
            _build(connection)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    sync_directory(path.parent)  # so that a power cut does not undo the rename


def _check_log(path: Path) -> None:
    """SQLite takes a log whose header is damaged for an empty one, and what was acknowledged would silently be gone.

    Of frames behind the header it believes all up to the first that is damaged, as after a power cut.
    """
    log = path.with_name(f"{FILE}-wal")
    if not log.exists():
        return
    with log.open("rb") as file:
        header = file.read(LOG_HEADER.size)
    if len(header) == LOG_HEADER.size and not _is_log_header(header):
        raise CatalogueError(str(path), f"is damaged: the header of {log.name} is none", MOVE_AWAY)


def _is_log_header(header: bytes) -> bool:
    """By its marks and its checksum: https://www.sqlite.org/fileformat2.html, 4.1 and 4.2."""
    mark, version, *_, first, second = LOG_HEADER.unpack(header)
    if mark & ~1 != LOG_MARK or version != LOG_VERSION:
        return False
    words = struct.unpack(">6I" if mark & 1 else "<6I", header[:24])
    one = two = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        one = (one + even + two) & 0xFFFFFFFF
        two = (two + odd + one) & 0xFFFFFFFF
    return (one, two) == (first, second)


def _connect(path: Path | str) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)  # the journal has a lock of its own


def _build(connection: sqlite3.Connection, since: int = 0) -> None:
    for statement in chain.from_iterable(MIGRATIONS[since:]):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """When this returns, the file is sound, ours, of this version, and open for writing."""
    connection.execute("PRAGMA synchronous = FULL")  # not every build of SQLite begins with it
    connection.execute("BEGIN IMMEDIATE")
    version = _version(connection, path)
    # Not quick_check, which is 10 ms faster with 15,000 versions: it believes an index that lacks a version of some
    # digest, and then somebody removes that content.
    (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        raise CatalogueError(str(path), f"is damaged: {found}", MOVE_AWAY)
    # Writes the version even where it stays the same, so that an operator hears now, and not at the first promotion,
    # that nobody may write.
    _build(connection, since=version)
    _check_tables(connection, path)
    connection.execute("COMMIT")
    connection.execute("PRAGMA foreign_keys = ON")  # only now: a migration may have to make a table anew


def _version(connection: sqlite3.Connection, path: Path) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        problem = f"was written by a newer server (its schema has version {version}, known is {len(MIGRATIONS)})"
        raise CatalogueError(str(path), problem, f"start the newer server, or {MOVE_AWAY}")
    if version < 1:
        raise CatalogueError(str(path), f"is no catalogue (its schema has version {version})", MOVE_AWAY)
    return version


def _check_tables(connection: sqlite3.Connection, path: Path) -> None:
    """They are those that this version makes, and no row points at one that is not there."""
    with closing(open_memory()) as fresh:
        if _tables(connection) != _tables(fresh):
            raise CatalogueError(str(path), "is no catalogue (its tables are others)", MOVE_AWAY)
    dangling = connection.execute("PRAGMA foreign_key_check").fetchone()
    if dangling is not None:
        table, _, missing, _ = dangling
        raise CatalogueError(str(path), f"is damaged: a row of {table} points at none of {missing}", MOVE_AWAY)


def _tables(connection: sqlite3.Connection) -> set[tuple[str, str, str]]:
    rows = connection.execute("SELECT type, name, sql FROM sqlite_master")
    return {row for row in rows if not row[1].startswith("sqlite_")}  # SQLite's own


def _write_ahead(connection: sqlite3.Connection, path: Path) -> None:
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        remedy = "name a state directory on a local disk"
        raise CatalogueError(str(path), "lies where SQLite can have no write-ahead log", remedy)
