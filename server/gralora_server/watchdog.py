"""Looks, from a thread of its own, whether the engine's thread gets on. What becomes of one that does not, others say.

A suspended process (SIGSTOP, a laptop's lid, a paused container) makes every clock jump, and no step is stuck for that.
Then this thread missed its own wake-ups as well: time in which nobody looked is not counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOKS_PER_LIMIT = 20
MAX_PAUSE_S = 1.0  # between two looks
ENDS_AFTER = 1.25  # times the limit: until then a step may still come back


class StepWatch:
    """For how long a step has been watched. Pure: it is told the time."""

    def __init__(self, pause_s: float) -> None:
        self._most_s = 2 * pause_s  # that one look can stand for
        self._looked_s: float | None = None
        self._began_s: float | None = None
        self._watched_s = 0.0

    def look(self, now_s: float, began_s: float | None) -> float:
        """`began_s`: when what the engine does now began; None: it waits for work."""
        before_s = self._looked_s if began_s == self._began_s else began_s
        if began_s != self._began_s:
            self._watched_s = 0.0
        if began_s is not None and before_s is not None:
            self._watched_s += min(now_s - before_s, self._most_s)
        self._began_s, self._looked_s = began_s, now_s
        return self._watched_s


@contextmanager
def watching(
    busy_since_s: Callable[[], float | None],
    *,
    limit_s: float,
    on_change: Callable[[bool], None],
    give_up: Callable[[], None] | None,
) -> Iterator[None]:
    """For as long as the block lasts. `on_change` is told whether the engine is stuck, `give_up` that it stays so; both
    are called in the watching thread.
    """
    over = threading.Event()
    watcher = threading.Thread(
        target=_watch,
        args=(over, busy_since_s, limit_s, on_change, give_up),
        name="gralora-watchdog",
        daemon=True,
    )
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _watch(
    over: threading.Event,
    busy_since_s: Callable[[], float | None],
    limit_s: float,
    on_change: Callable[[bool], None],
    give_up: Callable[[], None] | None,
) -> None:
    pause_s = min(MAX_PAUSE_S, limit_s / LOOKS_PER_LIMIT)
    watch, was_stuck = StepWatch(pause_s), False
    while not over.wait(pause_s):
        watched_s = watch.look(time.monotonic(), busy_since_s())
        is_stuck = watched_s > limit_s
        if is_stuck is not was_stuck:
            on_change(is_stuck)
            was_stuck = is_stuck
        if give_up is not None and watched_s > ENDS_AFTER * limit_s:
            give_up()
            return
