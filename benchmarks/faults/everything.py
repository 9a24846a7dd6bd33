"""All faults, in the order of their table."""

from __future__ import annotations

from benchmarks.faults import connections, processes
from benchmarks.faults.fault import Fault

EVERYTHING: tuple[Fault, ...] = (*processes.FAULTS, *connections.FAULTS)
