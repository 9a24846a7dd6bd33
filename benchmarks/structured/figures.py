"""What times say: in ms, a median and the most."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Tried:
    """One public schema. `outcome`: "compiled", or why not, in a word or two."""

    name: str
    outcome: str
    seconds: float


def ms(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": round(1e3 * statistics.median(seconds), 3), "most": round(1e3 * max(seconds), 3)}


def summary(tried: Iterable[Tried]) -> dict[str, Any]:
    all_of_them = list(tried)
    slowest = max(all_of_them, key=lambda one: one.seconds)
    return {
        "outcomes": dict(Counter(one.outcome for one in all_of_them)),
        "ms": ms([one.seconds for one in all_of_them]),
        "slowest": slowest.name,
    }
