"""Lists in a few numbers per segment are the lists of `plan_work`, whatever slots held before."""

from __future__ import annotations

import numpy as np
import pytest
from support.kernel_cases import CPU, MIXED, token_slots

from gralora_kernels import listing as listing_module
from gralora_kernels.grouping import Grouping
from gralora_kernels.listing import Listing, ListPlanner
from gralora_kernels.tables import ENTRIES, Entry, GroupTable, TableSet
from gralora_kernels.work import ITEM, Blocking, plan_work

BLOCKING = Blocking(
    small_tile=2, full_tile=4, rank_rows=4, columns=16, narrow_columns=8, narrow_tokens=4, depth=16, split_tokens=8,
)  # fmt: skip
SHAPES = [(48, [48, 24]), (48, [96]), (96, [48])] * 2
SLOTS = len(MIXED)


def written_out(planner: ListPlanner, step: Listing) -> np.ndarray:
    """As the device does it: items [items, 8]."""
    items = np.full((step.num_items, ITEM), -1, np.int32)
    for part in step.parts:
        for (slot, first, length, tiles), (start, first_piece, count, _) in zip(
            step.segments.tolist(), part.tolist(), strict=True
        ):
            for i in range(count * tiles):
                piece, done = planner.pieces[first_piece + i // tiles], i % tiles * step.tile_tokens
                changed = piece[0] + slot * ENTRIES, first + done, min(length - done, step.tile_tokens)
                items[start + i] = (*changed, *piece[3:])
    return items


def check(planner: ListPlanner, groups: list[GroupTable], grouping: Grouping) -> None:
    step, wanted = planner.plan(grouping), plan_work(groups, grouping, BLOCKING)
    items = written_out(planner, step)
    assert step.num_tokens == grouping.num_tokens
    assert (step.tile_tokens, step.is_split) == (wanted.tile_tokens, wanted.is_split)
    assert step.num_columns == wanted.num_columns
    assert step.order is grouping.order
    for group, head, columns, alignment, out_alignment in zip(
        wanted.groups, step.heads, step.columns, step.in_alignments, step.out_alignments, strict=True
    ):
        (shrink, num_shrink), (expand, num_expand) = head[:, :2].tolist()
        assert (num_shrink, num_expand) == (group.num_shrink_items, group.num_expand_items)
        assert (columns, alignment, out_alignment) == (group.num_columns, group.in_alignment, group.out_alignment)
        for here, there, count in (
            (shrink, group.shrink_start, num_shrink),
            (expand, group.expand_start, num_expand),
        ):
            assert np.array_equal(items[here : here + count], wanted.items[there : there + count])


def grouped(slots: list[int]) -> Grouping:
    grouping = Grouping(max(1, len(slots)))
    grouping.fill(slots, dict.fromkeys(range(SLOTS), 1))
    return grouping


def load(tables: TableSet, slot: int, layout) -> None:
    entries = [Entry(a_offset=0, b_offset=0, r=r, k=k, scale=1.0) for r, k in layout]
    tables.write(slot, dict.fromkeys(range(len(tables.modules)), entries))


@pytest.fixture
def tables() -> TableSet:
    tables = TableSet(SHAPES, SLOTS, CPU)
    for slot, layout in enumerate(MIXED):
        load(tables, slot, layout)
    return tables


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 40])
def test_every_groups_lists_are_those_of_the_specification(tables, num_tokens):
    check(ListPlanner(tables.groups, BLOCKING), list(tables.groups), grouped(token_slots(num_tokens, SLOTS, seed=1)))


def test_slots_that_change_hands_and_layers_with_ranks_of_their_own(tables):
    planner, generator = ListPlanner(tables.groups, BLOCKING), np.random.default_rng(0)
    for _ in range(60):
        slot = int(generator.integers(SLOTS))
        load(tables, slot, MIXED[generator.integers(SLOTS)])
        if generator.random() < 0.3:
            module = tables.modules[generator.integers(len(tables.modules))]
            module.set(slot, [Entry(a_offset=0, b_offset=0, r=int(generator.integers(1, 9)), k=1, scale=1.0)])
        check(planner, list(tables.groups), grouped(generator.integers(-1, SLOTS, generator.integers(1, 20)).tolist()))


def test_layers_of_a_kind_share_their_lists(tables):
    planner = ListPlanner(tables.groups, BLOCKING)

    step = planner.plan(grouped([0, 1, 2]))

    assert len(step.parts) == 2 * 3
    assert step.heads[:3].tolist() == step.heads[3:].tolist()


def test_what_was_seen_is_forgotten_before_it_grows_without_end(tables, monkeypatch):
    monkeypatch.setattr(listing_module, "MAX_PATTERNS", 10)
    planner = ListPlanner(tables.groups, BLOCKING)
    for rank in range(1, 40):
        load(tables, rank % SLOTS, [(rank, 1)])
        check(planner, list(tables.groups), grouped([rank % SLOTS, (rank - 1) % SLOTS]))

    assert planner.forgotten >= 3
    assert len(planner._patterns) <= 10 + SLOTS
