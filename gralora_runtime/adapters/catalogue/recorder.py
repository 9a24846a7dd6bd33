"""Writes what the catalogue becomes into its journal, in order, in a thread of its own. Decides nothing.

A change is noted under the manager's lock, as a row of what is so now, and costs nothing there. Whoever has promised
somebody that it is done waits with `flush`, outside of the lock, for the disk.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from gralora_runtime.adapters.catalogue.journal import Journal, NameRow
from gralora_runtime.errors import GraloraError

log = logging.getLogger(__name__)

USES_EVERY_S = 5.0  # so much of when versions were used may be lost
RETRY_S = 1.0  # a full disk may have room again


class Recorder:
    """Rows of one name that are noted before the disk was ready for the first are one row: the last."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._changed = threading.Condition()
        self._rows: dict[str, NameRow | None] = {}  # None: the name is gone
        self._uses: dict[tuple[str, int], float] = {}
        self._noted = self._written = 0  # rows, ever
        self._failure: GraloraError | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="adapter-journal", daemon=True)
        self._thread.start()

    def note(self, name: str, row: NameRow | None) -> None:
        with self._changed:
            self._rows[name] = row
            self._noted += 1
            self._changed.notify_all()

    def use(self, name: str, number: int, at_s: float) -> None:
        """Written now and then."""
        with self._changed:
            self._uses[name, number] = at_s

    def flush(self) -> None:
        """Return when all that was noted until now is on the disk, or raise why it cannot be written."""
        with self._changed:
            wanted, failure = self._noted, self._failure
            self._changed.wait_for(lambda: self._written >= wanted or self._failure is not failure or self._closing)
            if self._written < wanted and self._failure is not None:
                raise self._failure

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._journal.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rows or self._closing, timeout=USES_EVERY_S)
                rows, self._rows = self._rows, {}
                uses, self._uses = self._uses, {}
                noted, closing = self._noted, self._closing
            written = self._try(partial(self._write, rows)) if rows else True
            if uses:
                self._try(partial(self._journal.touch, uses))
            with self._changed:
                if written:
                    self._written, self._failure = noted, None
                else:
                    self._rows = rows | self._rows
                self._changed.notify_all()
                if closing:
                    return
                if not written:
                    self._changed.wait(RETRY_S)

    def _write(self, rows: dict[str, NameRow | None]) -> None:
        with self._journal.transaction():
            for name, row in rows.items():
                self._journal.remove_name(name)
                if row is not None:
                    self._journal.save_name(row)
                    for version in row.versions:
                        self._journal.save_version(version)

    def _try(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except GraloraError as error:
            log.error("%s", error)  # noqa: TRY400  # the sentence says it all
            with self._changed:
                self._failure = error
            return False
        return True
