"""The timelines of all requests that are under way, and of the last that ended: the first to end leave first."""

from __future__ import annotations

from gralora_runtime.observation.timeline import Timeline


class Timelines:
    """Written by the event loop, read by any thread."""

    def __init__(self, most: int) -> None:
        """`most` that have ended."""
        self._most = most
        self._under_way: dict[str, Timeline] = {}
        self._ended: dict[str, Timeline] = {}  # in the order in which they did

    def keep(self, timeline: Timeline) -> None:
        """Of a request that came, in the place of an older one of the same id."""
        self._ended.pop(timeline.request_id, None)
        self._under_way[timeline.request_id] = timeline

    def end(self, request_id: str) -> None:
        """It is under way no more. An id that is not known is nobody's here."""
        timeline = self._under_way.pop(request_id, None)
        if timeline is None:
            return
        self._ended[request_id] = timeline
        if len(self._ended) > self._most:
            del self._ended[next(iter(self._ended))]

    def find(self, request_id: str, *, since_s: float = 0.0) -> Timeline | None:
        """`since_s`: of one that was received then, by `time.monotonic`, or later."""
        found = self._under_way.get(request_id) or self._ended.get(request_id)
        return found if found is not None and found.received_s >= since_s else None

    def recent(self) -> list[Timeline]:
        """Those that have ended, and then those that are under way."""
        return [*self._ended.copy().values(), *self._under_way.copy().values()]
