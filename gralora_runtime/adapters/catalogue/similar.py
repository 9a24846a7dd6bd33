"""Which name somebody may have meant. Bounded, because strangers can ask for any name as often as they like."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import chain, islice

MAX_NAMES = 10_000  # looked at
MAX_COMPARED = 200  # compared letter by letter: milliseconds
CUTOFF = 0.75  # of 1: one letter in five may differ


def similar_name(name: str, names: Iterable[str]) -> str:
    """The nearest of `names`, or what Trainer left in a directory of that name; "" if there is neither."""
    looked_at = list(islice(names, MAX_NAMES))
    candidates = (known for known in looked_at if is_near(name, known))
    nearest = get_close_matches(name, list(islice(candidates, MAX_COMPARED)), n=1, cutoff=CUTOFF)
    inside = (known for known in looked_at if known.startswith(f"{name}/checkpoint-"))
    return next(chain(nearest, inside), "")


def is_near(name: str, known: str) -> bool:
    """Cheap: about as long, and the same beginning or end."""
    if abs(len(name) - len(known)) > max(len(name), len(known)) // 3 + 1:
        return False
    return name[:2].casefold() == known[:2].casefold() or name[-2:].casefold() == known[-2:].casefold()
