"""When service is again as it was before an overload."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gralora_server.loadtest.record import RequestRecord
from gralora_server.loadtest.summary import Frozen, Window, percentile

TIMES_AS_LONG = 1.5


class Recovery(Frozen):
    """Who has no first token waited for ever."""

    from_s: float  # the overload, from the start of the run
    to_s: float
    before_p99_s: float | None  # first token, of the requests before it; None: one in a hundred had none
    after_s: float | None  # seconds after its end from which on it is at most `TIMES_AS_LONG` that. None: never
    requests: int  # that were due from then on


def recovery(records: Sequence[RequestRecord], window: Window, from_s: float, to_s: float) -> Recovery:
    """By the 99th percentile of all requests that follow, in whole seconds."""
    before_s = _p99_s([one for one in records if window.start_s <= one.intended_s < from_s])
    following = [record for record in records if record.intended_s >= to_s]
    if before_s < math.inf:
        for after_s in range(math.ceil(window.end_s - to_s)):
            following = [record for record in following if record.intended_s >= to_s + after_s]
            if following and _p99_s(following) <= TIMES_AS_LONG * before_s:
                return Recovery(
                    from_s=from_s, to_s=to_s, before_p99_s=before_s, after_s=after_s, requests=len(following)
                )
    known_s = before_s if before_s < math.inf else None
    return Recovery(from_s=from_s, to_s=to_s, before_p99_s=known_s, after_s=None, requests=0)


def _p99_s(records: Sequence[RequestRecord]) -> float:
    """Infinite of no requests: nothing is then known."""
    if not records:
        return math.inf
    return percentile(sorted(math.inf if one.ttft_s is None else one.ttft_s for one in records), 99)
