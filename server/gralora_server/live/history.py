"""What the last ten minutes were like, a point a second. Knows no page."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from gralora_runtime.observation.activity import Activity
from gralora_runtime.observation.histogram import HistogramCounts

MAX_POINTS = 600
WINDOW_S = 10.0  # that percentiles, rates and phases are of: one second has too few first tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One moment. Percentiles are in seconds; None: there was nothing to tell."""

    at_s: float  # since the epoch
    running: int
    waiting: int  # for whatever reason
    generated_tokens_per_s: float
    prompt_tokens_per_s: float
    first_token_p50: float | None
    first_token_p95: float | None
    between_p50: float | None
    between_p99: float | None
    pages_leased: float  # of all, 0 to 1


class History:
    """Tell it what the engine does once a second."""

    def __init__(self) -> None:
        self._points: deque[Point] = deque(maxlen=MAX_POINTS)
        self._window: deque[tuple[float, Activity]] = deque()

    def note(self, at_s: float, activity: Activity) -> None:
        """`at_s`: since the epoch. A clock that was set back begins a new window."""
        if self._window and at_s <= self._window[-1][0]:
            self._window.clear()
        self._window.append((at_s, activity))
        while len(self._window) > 2 and self._window[1][0] <= at_s - WINDOW_S:
            self._window.popleft()
        self._points.append(self._point())

    def points(self, after_s: float) -> dict[str, list[float | None]]:
        """Those that are newer, as a column for each field."""
        found = [asdict(point) for point in self._points.copy() if point.at_s > after_s]
        return {name: [point[name] for point in found] for name in Point.__dataclass_fields__}

    def step_phases(self) -> Mapping[str, float]:
        """Seconds that each phase took, of an average step of late."""
        if not self._window:
            return {}
        first, last = self._window[0][1], self._window[-1][1]
        steps = last.load.steps - first.load.steps
        return {
            name: counts.since(first.phases[name]).sum / steps if steps else 0.0 for name, counts in last.phases.items()
        }

    def _point(self) -> Point:
        (began_s, first), (at_s, last) = self._window[0], self._window[-1]
        seconds = max(at_s - began_s, 1e-3)
        load = last.load
        first_token = last.first_token.since(first.first_token)
        between = last.inter_token.since(first.inter_token)
        return Point(
            at_s=round(at_s, 3),
            running=load.running,
            waiting=load.waiting + load.waiting_for_adapter,
            generated_tokens_per_s=round((load.generated_tokens - first.load.generated_tokens) / seconds, 1),
            prompt_tokens_per_s=round((last.prefill_tokens - first.prefill_tokens) / seconds, 1),
            first_token_p50=_rounded(first_token, 0.5),
            first_token_p95=_rounded(first_token, 0.95),
            between_p50=_rounded(between, 0.5),
            between_p99=_rounded(between, 0.99),
            pages_leased=round(load.pages_leased / load.pages_total, 4),
        )


def _rounded(counts: HistogramCounts, share: float) -> float | None:
    found = counts.quantile(share)
    return None if found is None else round(found, 5)
