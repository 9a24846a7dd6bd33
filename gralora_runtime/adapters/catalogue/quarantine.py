"""When what failed is worth another try: after a second, then after twice as long as before, up to five minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

FIRST_S = 1.0
LONGEST_S = 300.0


@dataclass(slots=True)
class Quarantine:
    """Of one version, or one name. Until it is over, whoever asks gets the same error at once."""

    failures: int = 0  # in a row
    until_s: float = 0.0  # of the clock
    now_s: Callable[[], float] = time.monotonic

    @property
    def lasts(self) -> bool:
        return self.now_s() < self.until_s

    @property
    def left_s(self) -> float:
        return max(0.0, self.until_s - self.now_s())

    def extend(self) -> None:
        """It failed (again)."""
        if not self.lasts:
            self.until_s = self.now_s() + min(FIRST_S * 2**self.failures, LONGEST_S)
            self.failures += 1

    def end(self) -> None:
        """It works, or is something else now."""
        self.failures, self.until_s = 0, 0.0
