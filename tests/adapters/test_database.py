"""A catalogue that cannot be trusted is refused with a way out, and never replaced by an empty one."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.promoter import NAMES, name_row, promote

from gralora_runtime.adapters.catalogue import database
from gralora_runtime.adapters.catalogue.database import FILE, LOCK, MIGRATIONS
from gralora_runtime.adapters.catalogue.journal import Journal, NameRow
from gralora_runtime.errors import CatalogueError

PAGE_BYTES = 4096
ROWS = tuple(name_row(name, 4) for name in NAMES)
NOBODY = 65534
MOVE_AWAY = "move catalogue.sqlite* away: names then come anew from the sources"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One with a sound catalogue, of which every page is in use."""
    with closing(Journal.open(tmp_path)) as journal:
        for name in NAMES:
            for number in range(1, 5):
                promote(journal, name, number)
    with raw(tmp_path) as connection:
        connection.execute("VACUUM")
    return tmp_path


@contextmanager
def raw(folder: Path) -> Iterator[sqlite3.Connection]:
    """The file without its journal, and without its rules."""
    with closing(sqlite3.connect(folder / FILE, isolation_level=None)) as connection:
        yield connection


def rows(folder: Path) -> tuple[NameRow, ...]:
    with closing(Journal.open(folder)) as journal:
        return journal.names()


def refusal(folder: Path) -> str:
    """What is said of a file that is refused, which stays as it is, and which nobody holds afterwards."""
    before = (folder / FILE).read_bytes()
    for _ in range(2):
        with pytest.raises(CatalogueError) as caught:
            Journal.open(folder)
        assert caught.value.reason == "CATALOGUE"
        assert caught.value.path == str(folder / FILE)
        assert str(folder / FILE) in str(caught.value)
        assert "another process" not in str(caught.value)
    assert before == (folder / FILE).read_bytes()
    return str(caught.value)


def test_a_sound_one_opens(folder: Path) -> None:
    assert rows(folder) == ROWS


# Damage.


@pytest.mark.parametrize("garbage", [b"", b"\0" * PAGE_BYTES, b"not a database. " * 1000, b"SQLite format 3\0"])
def test_a_file_of_something_else_is_refused(folder: Path, garbage: bytes) -> None:
    """An empty one too, which SQLite takes for a new one."""
    (folder / FILE).write_bytes(garbage)

    assert MOVE_AWAY in refusal(folder)


def test_a_file_that_was_cut_is_refused_wherever_it_was(folder: Path) -> None:
    whole = (folder / FILE).read_bytes()
    for num_bytes in (1, 99, 100, 512, *range(PAGE_BYTES, len(whole), PAGE_BYTES)):
        (folder / FILE).write_bytes(whole[:num_bytes])
        assert MOVE_AWAY in refusal(folder), num_bytes


def test_a_page_that_was_flipped_is_found_whichever_it_is(folder: Path) -> None:
    whole = (folder / FILE).read_bytes()
    assert len(whole) >= 10 * PAGE_BYTES
    for start in range(0, len(whole), PAGE_BYTES):
        flipped = bytes(byte ^ 0xFF for byte in whole[start : start + PAGE_BYTES])
        (folder / FILE).write_bytes(whole[:start] + flipped + whole[start + PAGE_BYTES :])
        assert MOVE_AWAY in refusal(folder), start


def test_a_bit_that_was_flipped_in_a_digest_is_found(folder: Path) -> None:
    """In the table or in its index; SQLite's quick check would not see it."""
    whole, digest = (folder / FILE).read_bytes(), ROWS[3].versions[1].digest.encode()
    places = [found.start() for found in re.finditer(digest, whole)]
    assert len(places) == 2
    for place in places:
        (folder / FILE).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert MOVE_AWAY in refusal(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("DELETE FROM versions WHERE number = 4", "a row of names points at none of versions"),
        ("DELETE FROM names WHERE name = 'name3'", "a row of versions points at none of names"),
    ],
)
def test_a_row_that_points_at_none_is_refused(folder: Path, change: str, problem: str) -> None:
    with raw(folder) as connection:
        connection.execute(change)

    assert f"is damaged: {problem}; {MOVE_AWAY}" in refusal(folder)


def test_a_value_that_no_rule_allows_is_refused(folder: Path) -> None:
    with raw(folder) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("UPDATE names SET canary_share = 2.0 WHERE name = 'name3'")

    assert f"is damaged: CHECK constraint failed in names; {MOVE_AWAY}" in refusal(folder)


@pytest.mark.parametrize("rest", ["-wal", "-journal"])
def test_a_log_without_its_file_is_not_played_into_a_new_one(folder: Path, rest: str) -> None:
    with closing(Journal.open(folder)) as journal:
        promote(journal, "name0", 5)
        (folder / "kept").write_bytes((folder / f"{FILE}-wal").read_bytes())
    (folder / FILE).unlink()
    (folder / "kept").rename(folder / f"{FILE}{rest}")
    with pytest.raises(
        CatalogueError, match=re.escape(f"is missing, but its {FILE}{rest} is there; bring it back, or")
    ):
        Journal.open(folder)
    assert not (folder / FILE).exists()

    (folder / f"{FILE}{rest}").unlink()
    assert rows(folder) == ()


@pytest.mark.parametrize("damaged", range(0, 32, 4))
def test_a_log_whose_header_is_damaged_is_not_taken_for_an_empty_one(folder: Path, damaged: int) -> None:
    with closing(Journal.open(folder)) as journal:
        promote(journal, "name0", 5)
        sound = (folder / f"{FILE}-wal").read_bytes()
        main = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(main)
    (folder / f"{FILE}-wal").write_bytes(sound[:damaged] + bytes([sound[damaged] ^ 0xFF]) + sound[damaged + 1 :])
    assert f"is damaged: the header of {FILE}-wal is none; {MOVE_AWAY}" in refusal(folder)

    (folder / f"{FILE}-wal").write_bytes(sound)
    assert next(row for row in rows(folder) if row.name == "name0").last_number == 5


# Making one.


def test_what_a_killed_process_left_of_a_new_one_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / f"{FILE}.new").write_bytes(b"half of it")

    assert rows(tmp_path) == ()
    assert {FILE, LOCK} == {path.name for path in tmp_path.iterdir()}


def test_one_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "MIGRATIONS", (*MIGRATIONS, ("CREATE TABLE names (name)",)))
    with pytest.raises(CatalogueError, match="table names already exists"):
        Journal.open(tmp_path)

    assert {LOCK} == {path.name for path in tmp_path.iterdir()}


def test_a_new_one_is_in_its_directory_for_good_before_anything_is_written_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append((os.fstat(file).st_ino, (tmp_path / FILE).exists())))
    Journal.open(tmp_path).close()

    assert flushed == [(tmp_path.stat().st_ino, True)]


def test_it_waits_for_the_disk_whatever_the_build_of_sqlite_begins_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin_normal(path: Path | str) -> sqlite3.Connection:
        connection = connect(path)
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    connect = database._connect
    monkeypatch.setattr(database, "_connect", begin_normal)
    with closing(Journal.open(tmp_path)) as journal:
        assert journal._connection.execute("PRAGMA synchronous").fetchone() == (2,)


# Versions of the schema.


def test_one_of_a_newer_server_is_refused(folder: Path) -> None:
    with raw(folder) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")

    message = refusal(folder)
    assert f"(its schema has version {len(MIGRATIONS) + 1}, known is {len(MIGRATIONS)}); start the newer" in message


@pytest.mark.parametrize(
    "change",
    [
        "PRAGMA user_version = 0",
        "PRAGMA user_version = -1",
        "CREATE TABLE more (a)",
        "DROP INDEX versions_by_digest",
        "ALTER TABLE names RENAME COLUMN canary TO bird",
    ],
)
def test_tables_of_somebody_else_are_refused(folder: Path, change: str) -> None:
    with raw(folder) as connection:
        connection.execute(change)

    assert "is no catalogue (its " in refusal(folder)


def test_one_of_an_older_server_is_brought_up_to_date_with_all_its_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a step that makes a table anew, which the rules of rows that point at each other would forbid."""
    added = "ALTER TABLE versions ADD COLUMN size INTEGER NOT NULL DEFAULT 0"
    again = (
        MIGRATIONS[0][0].replace("TABLE names (", "TABLE names_again ( owner TEXT, "),
        "INSERT INTO names_again SELECT NULL, * FROM names",
        "DROP TABLE names",
        "ALTER TABLE names_again RENAME TO names",
    )
    monkeypatch.setattr(database, "MIGRATIONS", (*MIGRATIONS, (added,), again))

    assert rows(folder) == ROWS
    with raw(folder) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 2,)
        assert connection.execute("SELECT DISTINCT size, owner FROM versions JOIN names").fetchall() == [(0, None)]
    with closing(Journal.open(folder)) as journal, pytest.raises(sqlite3.IntegrityError):
        journal.remove_version("name0", 4)


def test_a_step_that_fails_leaves_the_older_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ("ALTER TABLE names ADD COLUMN owner TEXT", "DELETE FROM versions WHERE number = 4")
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", (*MIGRATIONS, broken))
        assert "a row of names points at none of versions" in refusal(folder)

    assert rows(folder) == ROWS


# Where it lies.


@pytest.mark.parametrize("below", ["file", "file/state"])
def test_a_directory_that_cannot_be_is_told(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(
        CatalogueError, match=r"file.*/catalogue\.sqlite cannot be read or written: .*; see to the disk"
    ):
        Journal.open(tmp_path / below)


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A folder with a catalogue, to be opened by a user whom no rule spares; root becomes such a one meanwhile."""
    folder = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        assert rows(folder) == ()
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o700)
        shutil.rmtree(folder)


def test_a_directory_where_nobody_may_write_is_told(nobodys: Path) -> None:
    (nobodys / LOCK).unlink()
    nobodys.chmod(0o500)

    assert "cannot be read or written: [Errno 13] Permission denied" in refusal(nobodys)


def test_a_file_that_nobody_may_write_is_told_at_once_and_not_at_the_first_promotion(nobodys: Path) -> None:
    (nobodys / FILE).chmod(0o400)

    assert "cannot be read or written: attempt to write a readonly database; see to the disk" in refusal(nobodys)


def without_shared_memory(path: Path | str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path}?vfs=unix-dotfile", uri=True, isolation_level=None)


def test_where_there_is_no_write_ahead_log_there_is_no_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite would go on without one and say so to nobody who does not ask."""
    monkeypatch.setattr(database, "_connect", without_shared_memory)

    with pytest.raises(CatalogueError, match="no write-ahead log; name a state directory on a local disk"):
        Journal.open(tmp_path)


def test_opening_one_imports_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom gralora_runtime.adapters.catalogue.journal import Journal\n"
        f"Journal.open(Path({str(tmp_path)!r})).close()\nprint('torch' in sys.modules, 'numpy' in sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)

    assert told == "False False\n"
