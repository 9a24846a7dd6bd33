"""How fast counts grow, between the looks of somebody who looks now and then."""

from __future__ import annotations

from collections.abc import Mapping

MIN_S = 4.0  # between two looks, for a rate that is worth something
MAX_S = 60.0  # a look that is older says nothing of now


class Rates:
    """Of counters by name."""

    def __init__(self) -> None:
        self._before: tuple[float, Mapping[str, int]] | None = None
        self._found: Mapping[str, float] = {}

    def look(self, counts: Mapping[str, int], now_s: float) -> Mapping[str, float]:
        """A second, since the look before. Empty at the first one; what was not there before is missing."""
        if self._before is not None:
            then_s, before = self._before
            seconds = now_s - then_s
            if seconds < MIN_S:
                return self._found
            if seconds <= MAX_S:
                self._found = {
                    name: (count - before[name]) / seconds for name, count in counts.items() if name in before
                }
            else:
                self._found = {}
        self._before = (now_s, dict(counts))
        return self._found
