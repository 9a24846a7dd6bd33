"""What the request that comes next waited for, in seconds since the start. Who stands behind it waits for the same."""

from __future__ import annotations

from enum import StrEnum


class Hold(StrEnum):
    """Why the first in line does not run yet."""

    PLACE = "place"  # every row is taken
    PAGES = "pages"  # too little of the KV cache is free
    TURN = "turn"  # others' tokens are in the steps


Held = dict[Hold, float]  # seconds


class Holdups:
    """Written by the engine's thread, once a step."""

    def __init__(self) -> None:
        self._held: Held = dict.fromkeys(Hold, 0.0)
        self._now: Hold | None = None
        self._since_s = 0.0

    def note(self, hold: Hold | None, now_s: float) -> None:
        """From now on the first in line waits for this; None: nobody waits."""
        if self._now is not None:
            self._held[self._now] += now_s - self._since_s
        self._now, self._since_s = hold, now_s

    @property
    def now(self) -> Hold | None:
        """What the first in line waits for, from any thread."""
        return self._now

    def until(self, now_s: float) -> Held:
        held = dict(self._held)
        if self._now is not None:
            held[self._now] += now_s - self._since_s
        return held
