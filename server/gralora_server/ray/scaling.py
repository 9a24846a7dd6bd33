"""How many replicas there should be, by what their engines have to do. Leaf: Serve's controller gets a copy of it."""

from __future__ import annotations

from typing import Any

REQUESTS = "gralora_requests"  # running and waiting, of each replica


def by_requests(context: Any) -> tuple[float, dict[str, Any]]:
    """Serve's policy of `context.config` does the rest: bounds, delays, factors.

    Until replicas have told something, as many as there are to be.
    """
    told = (context.aggregated_metrics or {}).get(REQUESTS, {})
    if not told:
        return context.target_num_replicas, {}
    per_replica = sum(told.values()) / len(told)
    return context.current_num_replicas * per_replica / context.config.get_target_ongoing_requests(), {}
