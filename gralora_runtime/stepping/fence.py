"""Which steps may still be reading, for who wants to change what they read. A leaf: it knows no step."""

from __future__ import annotations

import threading


class StepFence:
    """Steps end in the order in which they were launched. One thread counts, any may wait."""

    def __init__(self) -> None:
        self._launched = self._returned = 0
        self._moved = threading.Condition()

    def launched(self) -> None:
        """A step is on its way."""
        with self._moved:
            self._launched += 1

    def returned(self) -> None:
        """The oldest step on its way has ended, in whatever way."""
        with self._moved:
            self._returned += 1
            self._moved.notify_all()

    def clear(self) -> None:
        """Nothing is on its way any more."""
        with self._moved:
            self._returned = self._launched
            self._moved.notify_all()

    @property
    def is_open(self) -> bool:
        """Whether a step is on its way. Nobody is kept waiting for the answer, which may be of a moment ago."""
        return self._returned < self._launched

    def wait(self) -> None:
        """Until all steps that are on their way now have ended."""
        with self._moved:
            launched = self._launched
            self._moved.wait_for(lambda: self._returned >= launched)
