"""Watches directory sources, and tells which names' files changed. Knows neither versions nor what is in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import watchfiles

from gralora_runtime.adapters.catalogue.sources.directory import DirectorySource

log = logging.getLogger(__name__)

# Milliseconds. Files that come this close together are one change, which is told after the second time at most.
QUIET_MS, LONGEST_MS = 200, 2000
POLL_MS = 2000


class Watcher:
    """One thread for all directories. Events of the system, or looks at all files every two seconds (`poll`)."""

    def __init__(
        self,
        sources: Sequence[DirectorySource],
        changed: Callable[[str], None],
        below: Callable[[set[str]], Collection[str]],
        *,
        poll: bool,
    ) -> None:
        """`changed` is called in the watcher's thread, once for each name that a change may concern.

        `below`: names that are known and begin with one of these, of which nothing is there any more.
        """
        self._sources = tuple(sources)
        self._changed = changed
        self._below = below
        self._poll = poll
        self._stop = threading.Event()
        self.watching = threading.Event()  # changes from now on are seen
        self._thread = threading.Thread(target=self._run, name="adapter-watcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._watch(poll=self._poll)
        except OSError as error:  # too many directories for the system's events, or it has none for this file system
            log.warning("adapter directories are looked at every %d s: %s", POLL_MS // 1000, error)
            self._watch(poll=True)

    def _watch(self, *, poll: bool) -> None:
        changes = watchfiles.watch(
            *(source.root for source in self._sources),
            watch_filter=None,
            debounce=LONGEST_MS,
            step=QUIET_MS,
            stop_event=self._stop,
            rust_timeout=QUIET_MS,
            yield_on_timeout=True,
            raise_interrupt=False,
            force_polling=poll,
            poll_delay_ms=POLL_MS,
            ignore_permission_denied=True,
        )
        for seen in changes:
            self.watching.set()
            for name in sorted(self._names([Path(path) for _, path in seen])):
                try:
                    self._changed(name)
                except Exception:
                    log.exception("a change of adapter %r could not be followed", name)

    def _names(self, paths: Sequence[Path]) -> set[str]:
        names = {name for source in self._sources for path in paths for name in source.names_at(path)}
        gone = {name for source in self._sources for path in paths if (name := source.gone_at(path))}
        return names.union(self._below(gone)) if gone else names
