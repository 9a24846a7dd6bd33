"""Who was refused, and was told when to come again: a line in which nobody has to stand. Knows no forecasts.

Each one is told a time of his own, as far after the one before as the server lately took between two of a tenant's. Who
then comes goes before those that come for the first time: for those whose time it is room is kept, as much as can be
expected to be wanted. How many do come again is learned, so that a line of people who never will costs nothing.

Somebody who comes again is known by his request's id.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from dataclasses import dataclass, field

SHORTEST_S, LONGEST_S = 0.05, 600.0
EARLY_S, GRACE_S = 0.05, 1.0  # before and after one's time, within which it is kept
MOST = 10_000  # whose times are remembered; the one that was told first is forgotten
LATELY = 0.1  # weight of the newest in the share that comes again
LEAST_SHARE = 0.05


@dataclass(slots=True, eq=False)
class _Line:
    """Of one tenant: whose time comes when, in that order."""

    dues: list[tuple[float, str]] = field(default_factory=list)

    def until(self, at_s: float) -> int:
        """How many have their time by then."""
        return bisect_right(self.dues, at_s, key=lambda due: due[0])


class Promises:
    """Of all tenants. Lives on the event loop's thread; times by `time.monotonic`."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}  # never empty
        self._told: OrderedDict[str, tuple[str, float]] = OrderedDict()  # tenant and time by id
        self.share = 1.0  # of those that were told a time, who come

    def came(self, tenant: str, request_id: str, now_s: float) -> bool:
        """A request came. Returns whether it was its time; who comes too early, or as another tenant, keeps it."""
        told = self._told.get(request_id)
        if told is None or told[0] != tenant:
            return False
        due_s = told[1]
        if now_s < due_s - EARLY_S:
            return False
        self._forget(request_id)
        in_time = now_s <= due_s + GRACE_S
        self._learn(came=in_time)
        if in_time:
            self._forget_the_late(tenant, now_s)
        return in_time

    def tell(
        self, tenant: str, request_id: str, *, soonest_s: float, turn_s: float, is_expected: bool, now_s: float
    ) -> float:
        """When to come again, in seconds from now: not before `soonest_s`, and after those that are in line before it.

        `turn_s`: between two of this tenant that are let in. `is_expected`: it came when it was told to, so it is
        behind those alone whose time it is, too.
        """
        self._forget_the_late(tenant, now_s)
        self._forget(request_id)
        line = self._lines.get(tenant)
        ahead = 0 if line is None else line.until(now_s) if is_expected else len(line.dues)
        told_s = min(max(SHORTEST_S, soonest_s, turn_s * (1.0 + self.share * ahead)), LONGEST_S)
        if told_s < LONGEST_S:  # else it is not known when
            due_s = now_s + told_s
            insort(self._lines.setdefault(tenant, _Line()).dues, (due_s, request_id))
            self._told[request_id] = (tenant, due_s)
            if len(self._told) > MOST:
                self._forget(next(iter(self._told)))
        return told_s

    def expected(self, tenant: str, within_s: float, now_s: float) -> float:
        """How many will come within that time, of those that may."""
        self._forget_the_late(tenant, now_s)
        line = self._lines.get(tenant)
        count = 0 if line is None else line.until(now_s + within_s)
        return max(1.0, self.share * count) if count else 0.0

    def _forget_the_late(self, tenant: str, now_s: float) -> None:
        line = self._lines.get(tenant)
        if line is None:
            return
        num_late = bisect_left(line.dues, now_s - GRACE_S, key=lambda due: due[0])
        for _, request_id in line.dues[:num_late]:
            self._forget(request_id)
            self._learn(came=False)

    def _forget(self, request_id: str) -> None:
        told = self._told.pop(request_id, None)
        if told is None:
            return
        tenant, due_s = told
        line = self._lines[tenant]
        del line.dues[bisect_left(line.dues, (due_s, request_id))]
        if not line.dues:
            del self._lines[tenant]

    def _learn(self, *, came: bool) -> None:
        self.share = max(LEAST_SHARE, self.share + LATELY * (float(came) - self.share))
