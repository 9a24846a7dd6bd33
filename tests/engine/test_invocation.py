"""Where an invocation is in a prompt: its last place, and never a part of it."""

from __future__ import annotations

import random

import pytest
from support.activated import last_place

from gralora_runtime.intake.invocation import first_adapted
from gralora_runtime.plan import NEVER


@pytest.mark.parametrize(
    ("invocation", "prompt", "place"),
    [
        ([], [1, 2, 3], 0),
        ([2], [1, 2, 3], 1),
        ([1, 2], [1, 2, 1, 2, 1], 2),
        ([1, 1], [1, 1, 1, 1], 2),
        ([1, 2, 3], [1, 2, 3], 0),
        ([1, 2, 3], [1, 2], NEVER),
        ([1, 2, 3], [1, 2, 1, 2, 4], NEVER),
        ([5], [], NEVER),
    ],
)
def test_the_last_place_counts(invocation: list[int], prompt: list[int], place: int) -> None:
    assert first_adapted(invocation, prompt) == place


def test_it_is_where_the_simplest_search_finds_it() -> None:
    """Of two letters, so that beginnings repeat within invocations."""
    rng = random.Random(0)
    found = set()
    for _ in range(3000):
        invocation = [rng.randrange(2) for _ in range(rng.randrange(1, 8))]
        prompt = [rng.randrange(2) for _ in range(rng.randrange(24))]
        place = last_place(invocation, prompt)
        found.add(place)

        assert first_adapted(tuple(invocation), prompt) == (NEVER if place is None else place)
    assert len(found) > 20
