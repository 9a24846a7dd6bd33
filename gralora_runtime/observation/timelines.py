"""The timelines of requests that are under way, and of recent ones: so many, the oldest leave first."""

from __future__ import annotations

import time

from gralora_runtime.observation.timeline import Timeline


class Timelines:
    """Written by the event loop, read by any thread."""

    def __init__(self, most: int) -> None:
        """`most` in all, if so many have ended."""
        self._most = most
        self._by_id: dict[str, Timeline] = {}  # the oldest first

    def keep(self, timeline: Timeline) -> None:
        """In the place of an older one of the same id, if there is one."""
        self._by_id.pop(timeline.request_id, None)
        self._by_id[timeline.request_id] = timeline
        self.trim()

    def trim(self) -> None:
        """One has come, or has ended."""
        if len(self._by_id) > self._most:
            oldest = next((one for one in self._by_id.values() if one.outcome), None)
            if oldest is not None:
                del self._by_id[oldest.request_id]

    def find(self, request_id: str) -> Timeline | None:
        return self._by_id.get(request_id)

    def recent(self) -> list[Timeline]:
        """The oldest first."""
        return list(self._by_id.copy().values())

    def leave(self, request_id: str) -> Timeline | None:
        """Its call has ended: there is nobody who reads. The last call's word counts."""
        timeline = self._by_id.get(request_id)
        if timeline is not None:
            timeline.left_s = time.monotonic()
        return timeline
