"""All faults, in the order of their table."""

from __future__ import annotations

from benchmarks.faults import clocks, disks, files, processes, settings, state
from benchmarks.faults.fault import Fault

EVERYTHING: tuple[Fault, ...] = (
    *processes.FAULTS,
    *files.FAULTS,
    *disks.FAULTS,
    *state.FAULTS,
    *clocks.FAULTS,
    *settings.FAULTS,
)
