"""Grouping: tokens sorted by slot, base-model tokens left out, work cut into tiles."""

from __future__ import annotations

import pytest

from gralora_kernels.grouping import TILE_TOKENS, Grouping


@pytest.mark.parametrize(
    ("token_slots", "order", "starts", "slots", "items"),
    [
        pytest.param([], [], [0], [], [], id="no-tokens"),
        pytest.param([-1, -1], [], [0], [], [], id="base-model-only"),
        pytest.param([5], [0], [0, 1], [5], [[5, 0, 1]], id="one-token"),
        pytest.param(
            [7, -1, 3, 7, 7], [2, 0, 3, 4], [0, 1, 4], [3, 7], [[3, 0, 1], [7, 1, 2], [7, 3, 1]], id="docstring"
        ),
        pytest.param([0, 0, 0], [0, 1, 2], [0, 3], [0], [[0, 0, 2], [0, 2, 1]], id="one-slot"),
        pytest.param([2, 1, 0], [2, 1, 0], [0, 1, 2, 3], [0, 1, 2], [[0, 0, 1], [1, 1, 1], [2, 2, 1]], id="reversed"),
    ],
)
def test_groups_tokens_by_slot(token_slots, order, starts, slots, items):
    grouping = Grouping(8, tile_tokens=2)
    grouping.fill([9] * 8, {9: 64})  # a fuller step before: nothing of it may remain

    grouping.fill(token_slots, dict.fromkeys(range(-1, 8), 4))

    assert order == grouping.order.tolist()
    assert starts == grouping.starts.tolist()
    assert slots == grouping.slots.tolist()
    assert items == grouping.items.tolist()
    assert (len(token_slots), len(order), len(slots), len(items)) == (
        grouping.num_tokens, grouping.num_adapted, grouping.num_segments, grouping.num_items,
    )  # fmt: skip
    assert (4 if order else 0) == grouping.max_width
    assert max([item[2] for item in items], default=0) == grouping.max_item_tokens


def test_width_is_the_widest_slot_of_this_step_only():
    grouping = Grouping(4)
    grouping.fill([0, 1], {0: 8, 1: 512})

    grouping.fill([0, -1], {0: 8, 1: 512, -1: 0})

    assert grouping.max_width == 8


def test_every_token_is_in_exactly_one_tile():
    grouping = Grouping(256)
    token_slots = [(t * 7) % 5 - 1 for t in range(256)]

    grouping.fill(token_slots, dict.fromkeys(range(-1, 4), 1))

    covered = [
        (slot, token)
        for slot, first, count in grouping.items.tolist()
        for token in grouping.order[first : first + count]
    ]
    assert sorted((slot, token) for token, slot in enumerate(token_slots) if slot >= 0) == sorted(covered)
    assert grouping.max_item_tokens <= TILE_TOKENS


def test_a_step_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3 tokens does not fit into a grouping for 2"):
        Grouping(2).fill([0, 0, 0], {0: 1})
