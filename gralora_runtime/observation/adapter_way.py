"""An adapter's way into the pool, for those who wait for it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum


class Station(StrEnum):
    """What is being done about it."""

    FIND = "find"  # sources are asked, as nobody knows the name yet
    LINE = "line"  # others are read first
    READ = "read"  # from disk, checked and packed; of a mix: its parts are brought together
    ROOM = "room"  # it waits for others to leave the pool
    COPY = "copy"  # into the pool
    TRIAL = "trial"  # it answers its golden prompts


@dataclass(slots=True, eq=False)
class AdapterWay:
    """Of one load. Whoever moves the adapter writes, one thread after the other; any may read."""

    marks: list[tuple[Station, float]] = field(default_factory=list)  # when each began, by `time.monotonic`
    num_bytes: int = 0  # of the pool, once they are known

    def reach(self, station: Station) -> None:
        self.marks.append((station, time.monotonic()))


@dataclass(slots=True, eq=False)
class AdapterWait:
    """Of one request: on which load it waits. Written by whoever puts it in line."""

    way: AdapterWay | None = None
