"""Who wants to hear of changes, and of which names they have not heard yet. Knows nothing of what changed.

Names that change again before somebody asked are one change, so a listener that is slow costs a set of names.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice


def any_name(_name: str) -> bool:
    """For those who may see everything."""
    return True


class Listener:
    """One who listens. `take` may be called from any thread."""

    def __init__(self, prefix: str, wake: Callable[[], None], sees: Callable[[str], bool]) -> None:
        self._prefix = prefix
        self._wake = wake
        self._sees = sees
        self._lock = threading.Lock()
        self._names: dict[str, None] = {}  # in the order in which they changed first

    def tell(self, name: str) -> None:
        if not (name.startswith(self._prefix) and self._sees(name)):
            return
        with self._lock:
            is_first = not self._names
            self._names[name] = None
        if is_first:
            self._wake()

    def take(self, limit: int) -> tuple[str, ...]:
        """At most so many names. Empty: `wake` is called when there are some."""
        with self._lock:
            names = tuple(islice(self._names, limit))
            for name in names:
                del self._names[name]
            return names


class Changes:
    """All listeners. `touch` costs next to nothing while there is none."""

    def __init__(self) -> None:
        self._listeners: tuple[Listener, ...] = ()
        self._lock = threading.Lock()

    def listen(self, prefix: str, wake: Callable[[], None], sees: Callable[[str], bool] = any_name) -> Listener:
        """`wake` and `sees` are called from whatever thread changes something, and must not wait."""
        listener = Listener(prefix, wake, sees)
        with self._lock:
            self._listeners += (listener,)
        return listener

    def leave(self, listener: Listener) -> None:
        with self._lock:
            self._listeners = tuple(other for other in self._listeners if other is not listener)

    def touch(self, name: str) -> None:
        for listener in self._listeners:
            listener.tell(name)
