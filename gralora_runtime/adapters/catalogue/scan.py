"""Looks into all adapter directories when the server starts: side by side, and beside serving if it takes long."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from gralora_runtime.adapters.catalogue.names import is_name
from gralora_runtime.adapters.catalogue.store import AdapterRecord
from gralora_runtime.adapters.checkpoint.header import AdapterSummary
from gralora_runtime.adapters.checkpoint.spec import rejected, to_keep
from gralora_runtime.errors import AdapterRejectedError

log = logging.getLogger(__name__)

NUM_THREADS = 2  # Python's, so more would not be faster; one directory that takes its whole budget delays no other
WAIT_S = 5.0  # then serving begins: a request does not need what a scan finds

Found = AdapterSummary | AdapterRejectedError


def adapter_directories(root: Path) -> Iterator[Path]:
    """Every directory in `root` that has an adapter's name."""
    for source in sorted(root.iterdir()):
        try:
            if is_name(source.name) and source.is_dir():
                yield source
        except OSError as cause:
            log.warning("%s is passed over: %s", source, cause)


class Scan:
    """Tells what each directory holds. Its threads end by themselves, and never keep the process from ending."""

    def __init__(
        self,
        records: Iterable[AdapterRecord],
        summarize: Callable[[str, Path], AdapterSummary],
        tell: Callable[[AdapterRecord, Found], None],
    ) -> None:
        self._left = deque(records)
        self._summarize = summarize
        self._tell = tell
        self._threads = [
            threading.Thread(target=self._work, name="adapter-scan", daemon=True) for _ in range(NUM_THREADS)
        ]

    def run(self, wait_s: float = WAIT_S) -> None:
        """Start, and wait for the end for so long at most."""
        num_directories = len(self._left)
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join(wait_s / NUM_THREADS)
        if any(thread.is_alive() for thread in self._threads):
            left = len(self._left)
            log.warning("%d of %d adapter directories are still being looked into", left, num_directories)

    def stop(self) -> None:
        """Look into no more directories."""
        self._left.clear()

    def _work(self) -> None:
        while True:
            try:
                record = self._left.popleft()
            except IndexError:
                return
            self._tell(record, self._look_into(record))

    def _look_into(self, record: AdapterRecord) -> Found:
        try:
            return self._summarize(record.name, record.source)
        except AdapterRejectedError as error:
            return to_keep(error)
        except Exception as error:
            log.exception("looking into adapter %r failed", record.name)
            return rejected(record.name, [f"looking into it failed ({type(error).__name__}: see the server's log)"])
