"""A rate: so many units each second, and what was not used for up to some seconds at once. Has no clock of its own.

What is used beyond that is a debt, and nothing is let in before the seconds that follow have paid it: how much a
request will use is known only when it has, so it is let in while one unit is there, and charged as it uses more. Over
time the rate is kept to exactly, a request of any size gets in, and none has to be estimated rightly.
"""

from __future__ import annotations

import math

ROUNDING_S = 1e-6  # how much sooner than it should be a unit may be there: sums of times are rounded


class TokenBucket:
    """Kept as the moment at which one whole unit is there: how long to wait for it is then a difference, and exact."""

    __slots__ = ("_rate", "_ready_s", "_slack_s")

    def __init__(self, rate: float, burst_s: float, now_s: float) -> None:
        """Full. It holds `burst_s` seconds' worth, and at least one unit."""
        self._set(rate, burst_s)
        self._ready_s = now_s - self._slack_s

    def wait_s(self, now_s: float) -> float:
        """Until one unit is there, if nobody uses anything meanwhile; 0: it is."""
        wait_s = self._ready_s - now_s
        if wait_s <= ROUNDING_S:
            return 0.0
        return math.nextafter(wait_s, math.inf)  # the difference may be rounded down, and then somebody came too soon

    def charge(self, units: float, now_s: float) -> None:
        """They are used, whether or not there are as many. Negative: they were not used after all."""
        self._ready_s = max(self._ready_s, now_s - self._slack_s) + units / self._rate

    def change(self, rate: float, burst_s: float, now_s: float) -> None:
        """Another rate from now on. As many units are there as before, or are owed."""
        units = (now_s - max(self._ready_s, now_s - self._slack_s)) * self._rate
        self._set(rate, burst_s)
        self._ready_s = now_s - units / rate

    def is_full(self, now_s: float) -> bool:
        """A new one would be the same."""
        return self._ready_s <= now_s - self._slack_s

    def _set(self, rate: float, burst_s: float) -> None:
        self._rate = rate
        self._slack_s = max(0.0, burst_s - 1 / rate)  # of the burst, beside that one unit
