"""What is kept of usage when a server ends, is killed, or finds a file that is none."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from support.usage_keeper import ADAPTER, TENANT

from gralora_server.errors import UsageFileError
from gralora_server.tenants.keeping import keeping
from gralora_server.tenants.usage import Counts, Usage, UsageRow
from gralora_server.tenants.usage_file import FILE, SCHEMA_VERSION, UsageFile

KEEPER = Path(__file__).parent.parent / "support" / "usage_keeper.py"
NUM_KILLS = 6
ROWS = [UsageRow("", "", Counts(1, 2, 3, 4, 5, 6)), UsageRow("acme", "org/poet@main", Counts(requests=2**62))]


def kept_in(folder: Path) -> list[UsageRow]:
    file = UsageFile(folder)
    try:
        return file.read()
    finally:
        file.close()


def everything(usage: Usage) -> list[UsageRow]:
    return usage.rows(tenant=None, first=("", ""), limit=1000)


def test_rows_come_back_as_they_were_last_written(tmp_path: Path) -> None:
    file = UsageFile(tmp_path / "new" / "folder")
    file.write([UsageRow("", "", Counts())])
    file.write(ROWS)
    file.close()

    assert kept_in(tmp_path / "new" / "folder") == ROWS


async def test_counts_go_on_after_a_restart(tmp_path: Path) -> None:
    for number in range(1, 4):
        usage = Usage()
        async with keeping(usage, tmp_path):
            usage.add("acme", "poet", Counts(requests=1, output_tokens=10))
            usage.refuse("acme", "unknown")
        assert [row.counts for row in everything(usage)] == [
            Counts(refused=number),
            Counts(requests=number, output_tokens=10 * number),
        ]


async def test_without_a_folder_nothing_is_kept() -> None:
    usage = Usage()
    async with keeping(usage, None):
        usage.add("acme", "poet", Counts(requests=1))

    assert len(everything(usage)) == 1


async def test_what_cannot_be_written_is_tried_again(tmp_path: Path, monkeypatch, caplog) -> None:
    """And is not counted twice, though the write may have happened all the same."""
    tried, is_broken = asyncio.Event(), True
    loop, write = asyncio.get_running_loop(), UsageFile.write

    def written(file: UsageFile, rows: list[UsageRow]) -> None:
        write(file, rows)
        if is_broken:
            loop.call_soon_threadsafe(tried.set)
            raise UsageFileError("there", "is on fire")

    monkeypatch.setattr(UsageFile, "write", written)
    usage = Usage()
    async with keeping(usage, tmp_path, every_s=0.001):
        usage.add("acme", "poet", Counts(requests=1))
        await asyncio.wait_for(tried.wait(), 10)
        is_broken = False

    assert "usage cannot be kept in there: it is on fire" in caplog.text
    assert kept_in(tmp_path) == [UsageRow("acme", "poet", Counts(requests=1))]


async def test_the_file_is_free_again_whatever_ends_the_server(tmp_path: Path) -> None:
    usage = Usage()

    async def fail() -> None:
        async with keeping(usage, tmp_path):
            usage.add("acme", "poet", Counts(requests=1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()

    assert kept_in(tmp_path) == everything(usage)


def killed_while_counting(folder: Path, num_lines: int) -> tuple[int, int]:
    """The last number that was surely kept, and the last that may have been."""
    with subprocess.Popen(
        [sys.executable, KEEPER, folder],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(num_lines)]
        process.kill()
        lines += process.stdout.read().splitlines()
    numbers: dict[str, int] = {}
    for line in lines:
        word, _, number = line.strip().partition(" ")
        if number.isdigit():
            numbers[word] = int(number)
    return numbers.get("kept", 0), numbers["counting"]


def test_a_kill_loses_only_what_was_not_written_and_nothing_counts_twice(tmp_path: Path) -> None:
    moments = random.Random(0)
    total = 0
    for _ in range(NUM_KILLS):
        kept, counted = killed_while_counting(tmp_path, moments.randrange(1, 2000))
        (row,) = kept_in(tmp_path) or [UsageRow(TENANT, ADAPTER, Counts())]
        assert max(kept, total) <= row.counts.requests <= counted
        assert row.counts.output_tokens == 3 * row.counts.requests
        total = row.counts.requests

    assert total > 0


def test_two_servers_cannot_have_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("gralora_server.tenants.usage_file.LOCK_WAIT_S", 0.01)
    first = UsageFile(tmp_path)
    try:
        with pytest.raises(UsageFileError, match="database is locked"):
            UsageFile(tmp_path)
        first.write(ROWS)
    finally:
        first.close()

    assert kept_in(tmp_path) == ROWS


def damage(path: Path) -> None:
    path.write_bytes(b"no database at all, but long enough for a header" * 100)


def make_newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()


def make_other(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE other (x)")
    connection.close()


def falsify(path: Path) -> None:
    """A count that is none."""
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("INSERT INTO usage VALUES ('acme', 'poet', -5, 0, 0, 0, 0, 'many')")
    connection.close()


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (damage, "file is not a database"),
        (make_newer, "was written by a newer server"),
        (make_other, "is another file"),
        (falsify, "is damaged: CHECK constraint failed"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused_and_left_as_it_is(spoil, problem: str, tmp_path: Path) -> None:
    UsageFile(tmp_path).close()
    spoil(tmp_path / FILE)
    before = (tmp_path / FILE).read_bytes()

    with pytest.raises(UsageFileError, match=problem):
        UsageFile(tmp_path)

    assert (tmp_path / FILE).read_bytes() == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UsageFileError, match="cannot be read or written"):
        UsageFile(tmp_path / "file")
