"""All faults, in the order of their table."""

from __future__ import annotations

from benchmarks.faults import clocks, connections, disks, files, processes, settings, state
from benchmarks.faults.fault import Fault

EVERYTHING: tuple[Fault, ...] = (
    *processes.FAULTS,
    *connections.FAULTS,
    *disks.FAULTS,
    *files.FAULTS,
    *clocks.FAULTS,
    *state.FAULTS,
    *settings.FAULTS,
)
