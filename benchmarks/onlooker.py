"""Somebody who looks again and again while something is measured, in a thread of the same process: it costs, too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def looking(look: Callable[[], object], *, every_s: float) -> Iterator[list[float]]:
    """Yields the seconds that each look took."""
    over = threading.Event()
    taken_s: list[float] = []

    def go_on() -> None:
        while not over.is_set():
            started_s = time.perf_counter()
            look()
            taken_s.append(time.perf_counter() - started_s)
            over.wait(every_s)

    onlooker = threading.Thread(target=go_on)
    onlooker.start()
    try:
        yield taken_s
    finally:
        over.set()
        onlooker.join()
