"""Looks into adapter directories: all that are there at start, beside serving if it takes long, then what comes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from gralora_runtime.adapters.catalogue.store import AdapterVersion
from gralora_runtime.adapters.checkpoint.header import AdapterSummary
from gralora_runtime.adapters.checkpoint.spec import rejected, to_keep
from gralora_runtime.errors import AdapterRejectedError

log = logging.getLogger(__name__)

NUM_THREADS = 2  # Python's, so more would not be faster; one directory that takes its whole budget delays no other
WAIT_S = 0.3  # then serving begins: a request does not need what a scan finds

Seen = AdapterSummary | AdapterRejectedError


class Scan:
    """Tells what each directory holds. Its threads end when nothing is left, and never keep the process from ending."""

    def __init__(
        self,
        summarize: Callable[[AdapterVersion], AdapterSummary],
        tell: Callable[[AdapterVersion, Seen], None],
    ) -> None:
        self._left: deque[AdapterVersion] = deque()
        self._summarize = summarize
        self._tell = tell
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._stopped = False

    def add(self, version: AdapterVersion) -> None:
        """Look into its directory soon."""
        with self._lock:
            self._left.append(version)
            if len(self._threads) < NUM_THREADS and not self._stopped:
                thread = threading.Thread(target=self._work, name="adapter-scan", daemon=True)
                self._threads.add(thread)
                thread.start()

    def wait(self, wait_s: float = WAIT_S) -> None:
        """Wait until all have been looked into, for so long at most."""
        until_s = time.monotonic() + wait_s
        for thread in tuple(self._threads):
            thread.join(max(0.0, until_s - time.monotonic()))
        if left := len(self._left):
            log.warning("%d adapter directories are still being looked into", left)

    def stop(self) -> None:
        """Look into no more directories."""
        with self._lock:
            self._stopped = True
            self._left.clear()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._left:
                    self._threads.discard(threading.current_thread())
                    return
                version = self._left.popleft()
            self._tell(version, self._look_into(version))

    def _look_into(self, version: AdapterVersion) -> Seen:
        try:
            return self._summarize(version)
        except AdapterRejectedError as error:
            return to_keep(error)
        except Exception as error:
            log.exception("looking into adapter %r failed", version.name)
            return rejected(version.name, [f"looking into it failed ({type(error).__name__}: see the server's log)"])
