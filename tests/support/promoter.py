"""A program whose children promote versions until they are killed. Reads a folder a line; imports no more than it must.

Of each child it tells: `pid P`; for each promotion that the journal said is done, `done NAME NUMBER`; and once it is
gone, `gone STATUS`. Children are forked, because a hundred interpreters would take longer than all that is tested.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from itertools import count
from pathlib import Path

from support.forking import Forking

from gralora_runtime.adapters.catalogue.journal import Journal, NameRow, VersionRow

NAMES = tuple(f"name{index}" for index in range(7))
NUM_KEPT = 3  # versions of each name


def version_row(name: str, number: int) -> VersionRow:
    """Long enough that a promotion changes several pages, and splits some."""
    return VersionRow(
        name=name,
        number=number,
        digest=hashlib.sha256(f"{name} {number}".encode()).hexdigest(),
        source="/" + "x" * (number * 677 % 3000),
        stored=True,
        pinned=False,
        created_s=float(number),
        last_used_s=0.0,
        error="",
    )


def name_row(name: str, number: int) -> NameRow:
    """As it is when that version was promoted."""
    numbers = range(max(1, number - NUM_KEPT + 1), number + 1)
    return NameRow(
        name=name,
        current=number,
        previous=number - 1 or None,
        newest=number,
        last_number=number,
        seen='{"/a": null}',
        canary=None,
        canary_share=0.0,
        pinned=False,
        unloaded=False,
        versions=tuple(version_row(name, number) for number in numbers),
    )


def promote(journal: Journal, name: str, number: int) -> None:
    """The name first: in between it points at a version that is not there."""
    with journal.transaction():
        journal.save_name(name_row(name, number))
        journal.save_version(version_row(name, number))
        journal.remove_version(name, number - NUM_KEPT)


def promote_until_killed(folder: Path) -> None:
    tell(f"pid {os.getpid()}")
    journal = Journal.open(folder)
    journal._connection.execute("PRAGMA wal_autocheckpoint = 20")  # every few promotions, not every few hundred
    current = {row.name: row.current or 0 for row in journal.names()}
    for turn in count():
        name = NAMES[turn % len(NAMES)]
        current[name] = current.get(name, 0) + 1
        promote(journal, name, current[name])
        tell(f"done {name} {current[name]}")


def tell(line: str) -> None:
    """In one piece, and out of this process: what is in a buffer dies with it."""
    os.write(1, f"{line}\n".encode())


def main() -> None:
    assert "torch" not in sys.modules
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            promote_until_killed(Path(line.rstrip("\n")))
        _, status = os.waitpid(child, 0)
        tell(f"gone {os.waitstatus_to_exitcode(status)}")


class Promoters(Forking):
    """That program, seen from a test."""

    program = __file__

    def start(self, folder: Path) -> int:
        """The pid of a child that promotes there."""
        assert self._process.stdin
        self._process.stdin.write(f"{folder}\n")
        told, pid = self._told()
        assert told == "pid"
        return int(pid)

    def done(self) -> tuple[str, int]:
        """The child's next promotion, once the journal said that it is done."""
        told, name, number = self._told()
        assert told == "done"
        return name, int(number)

    def kill(self, pid: int) -> list[tuple[str, int]]:
        """What the child has told until then."""
        os.kill(pid, signal.SIGKILL)
        rest = []
        while (told := self._told())[0] == "done":
            rest.append((told[1], int(told[2])))
        assert told == ["gone", str(-signal.SIGKILL)]
        return rest

    def _told(self) -> list[str]:
        assert self._process.stdout
        return self._process.stdout.readline().split()


if __name__ == "__main__":
    main()
