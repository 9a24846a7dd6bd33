"""How much of the cores' time loads may take while steps run on the same cores. Knows neither loads nor steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

LONGEST_S = 0.05  # of one pause: the steps may have ended meanwhile


def no_step_runs() -> bool:
    """For whoever shares its cores with nobody."""
    return False


class Pace:
    """Work in pieces, with pauses in between: of all threads together, no more than a share of the time is work.

    A step waits for its slowest core, so what counts is that each piece is short: of half a millisecond or so.
    """

    def __init__(self, *, share: float = 1.0, cores: int = 1, steps_run: Callable[[], bool] = no_step_runs) -> None:
        """`share`: of all `cores`' time, above 0. `steps_run` is asked before each piece."""
        self.cores = cores
        self.steps_run = steps_run
        self._pause_per_work = max(0.0, 1.0 / (share * cores) - 1.0)
        self._pausing = threading.Lock()  # so that pauses add up, whoever makes them; work waits for nobody's work

    def keep(self, work: Callable[[Item], Result], item: Item) -> Result:
        """Do it, and rest for as long as it makes necessary."""
        if self._pause_per_work == 0.0 or not self.steps_run():
            return work(item)
        began_s = time.thread_time()  # a thread that waits for a disk takes nobody's time
        try:
            return work(item)
        finally:
            pause_s = min((time.thread_time() - began_s) * self._pause_per_work, LONGEST_S)
            with self._pausing:
                time.sleep(pause_s)
