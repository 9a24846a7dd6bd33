"""Calls what has to be looked at now and then, in a thread of its own. Knows not what that is."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

EVERY_S = 60.0


class Housekeeping:
    """One thread, which sleeps between calls. A call that raises is logged, and the next one comes all the same."""

    def __init__(self, tidy: Callable[[], None], *, every_s: float = EVERY_S) -> None:
        self._tidy = tidy
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adapter-housekeeping", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Returns when the call that is under way is over."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self._tidy()
            except Exception:
                log.exception("tidying up adapters failed")
