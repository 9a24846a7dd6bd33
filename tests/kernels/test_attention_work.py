"""A step's attention as items: every query sees every stretch of its context once, and parts are merged in order."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from gralora_kernels.attention_work import MAX_ITEMS, SPLIT, max_partials, plan_attention


def step(*rows):
    """(queries, context) of each row."""
    starts = np.cumsum([0, *(queries for queries, _ in rows)]).astype(np.int32)
    return starts, np.array([context for _, context in rows], np.int32)


MIXED = [(1, 70), (1, 3 * SPLIT + 5), (1, 0), (20, 33), (5, SPLIT + 2), (1, 1), (1, SPLIT), (300, 300)]
LONG = [(1, MAX_ITEMS * SPLIT * 3 + 1), (1, 40)]


@pytest.mark.parametrize("tile_tokens", [1, 4, 16])
@pytest.mark.parametrize("rows", [MIXED, LONG, [(1, 0)], [(7, 7)]], ids=["mixed", "long", "padding", "prompt"])
def test_every_query_sees_each_stretch_of_its_context_once(rows, tile_tokens):
    starts, lengths = step(*rows)

    work = plan_attention(starts, lengths, tile_tokens)

    done: Counter = Counter()
    for row, first, count, begin, end, _, _, _ in work.items.tolist():
        assert 0 < count <= (1 if rows[row][0] == 1 else tile_tokens)
        assert starts[row] <= first < first + count <= starts[row + 1]
        done.update((token, stretch) for token in range(first, first + count) for stretch in range(begin, end))
    wanted = {
        (token, stretch)
        for row, (queries, context) in enumerate(rows)
        for token in range(starts[row], starts[row + 1] if context else starts[row])
        for stretch in range(-(-(context - queries + token - starts[row] + 1) // SPLIT))
    }
    # A tile does what its last query sees; what the others do not see adds nothing.
    assert set(done) >= wanted
    assert set(done.values()) <= {1}
    for token, stretch in set(done) - wanted:
        assert any((token + later, stretch) in wanted for later in range(1, tile_tokens))


def test_parts_of_a_row_are_merged_in_their_order():
    starts, lengths = step(*MIXED, *LONG)

    work = plan_attention(starts, lengths, 16)

    parts = {int(item[5]): item for item in work.items if item[5] >= 0}
    assert sorted(parts) == list(range(work.num_partials))
    for token, first, count, row, each, *_ in work.merges.tolist():
        assert 1 < count <= MAX_ITEMS
        assert token == starts[row]
        assert [int(parts[first + i][0]) for i in range(count)] == [row] * count
        assert [int(parts[first + i][3]) for i in range(count)] == [each * i for i in range(count)]
    assert {row for _, _, _, row, *_ in work.merges.tolist()} == {1, len(MIXED)}


def test_how_a_row_is_cut_does_not_depend_on_its_neighbours():
    for queries, context in (*MIXED, *LONG):
        alone = plan_attention(*step((queries, context)), 4)
        beside = plan_attention(*step((1, 9000), (queries, context), (3, 3)), 4)
        mine = beside.items[beside.items[:, 0] == 1]
        assert np.array_equal(alone.items[:, 2:5], mine[:, 2:5])


@pytest.mark.parametrize("context", [1, SPLIT, SPLIT + 1, 10 * SPLIT, 200 * SPLIT])
def test_no_step_has_more_parts_than_there_is_memory_for(context):
    work = plan_attention(*step(*[(1, context)] * 3), 4)

    assert work.num_partials <= max_partials(3, context)
    assert len(work.items) <= max_partials(3, context)
