"""Work lists: every multiply-add of a step is in exactly one item, and no item is empty."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from support.kernel_cases import CPU, MIXED, make_case, token_slots

from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import ENTRIES, Entry, GroupTable
from gralora_kernels.work import Blocking, StepWork, plan_work

BLOCKING = Blocking(
    small_tile=2, full_tile=4, rank_rows=4, columns=16, narrow_columns=8, narrow_tokens=4, depth=16, split_tokens=8,
)  # fmt: skip


def lists_of(work: StepWork, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
    part = work.groups[group]
    shrink = work.items[part.shrink_start :][: part.num_shrink_items]
    return shrink, work.items[part.expand_start :][: part.num_expand_items]


@pytest.mark.parametrize("num_tokens", [1, 7, 97])
@pytest.mark.parametrize("outs", [[48], [72, 24, 24], [96, 96]], ids=str)
def test_every_piece_of_a_step_is_done_once(outs, num_tokens):
    case = make_case(48, outs, MIXED)
    slots = token_slots(num_tokens, len(MIXED), seed=2)
    grouping = case.grouping(slots)

    work = plan_work([case.group], grouping, BLOCKING)
    shrink, expand = lists_of(work)

    assert work.is_split == (num_tokens < 8)
    done: Counter = Counter()
    for row, first, count, n, p, _, begin, plane in shrink.tolist():
        m, slot, entry = row // ENTRIES // len(MIXED), row // ENTRIES % len(MIXED), row % ENTRIES
        r, k = case.group.modules[m].host_index[slot, entry, 2:].tolist()
        assert begin == plane * BLOCKING.depth
        done.update(
            (int(grouping.order[first + t]), m, slot, entry, n, q, i)
            for t in range(count)
            for q in range(p, min(p + 4, r))
            for i in range(begin, min(begin + BLOCKING.depth, 48 // k) if work.is_split else 48 // k)
        )
    wanted = Counter(
        (t, m, slot, e, n, q, i)
        for t, slot in enumerate(slots) if slot >= 0
        for m, table in enumerate(case.group.modules)
        for e, (_, _, r, k) in enumerate(table.host_index[slot].tolist())
        for n in range(k) for q in range(r) for i in range(48 // k)
    )  # fmt: skip
    assert wanted == done

    written: Counter = Counter()
    for row, first, count, begin, end, _, start, out in expand.tolist():
        m, slot = row // ENTRIES // len(MIXED), row // ENTRIES % len(MIXED)
        assert (start, out) == (case.group.column_starts[m], outs[m])
        assert 0 < end - begin <= 16
        ks = [k for _, _, r, k in case.group.modules[m].host_index[slot].tolist() if r]
        assert all(begin // (out // k) == (end - 1) // (out // k) for k in ks), "an item straddles blocks"
        written.update((int(grouping.order[first + t]), start + o) for t in range(count) for o in range(begin, end))
    assert written == Counter(
        (t, start + o)
        for t, slot in enumerate(slots) if slot >= 0
        for start, table in zip(case.group.column_starts, case.group.modules, strict=True)
        if table.width(slot) or table.host_affine[slot]
        for o in range(table.out_features)
    )  # fmt: skip


def test_layers_with_equal_ranks_share_their_lists():
    layers = [make_case(48, [48, 24], MIXED).group for _ in range(3)]
    layers[2].modules[0].set(0, [Entry(a_offset=0, b_offset=0, r=2, k=1, scale=1.0)])
    grouping = Grouping(8)
    grouping.fill([0, 1, 1], dict.fromkeys(range(8), 1))

    first, second, other = plan_work(layers, grouping, BLOCKING).groups

    assert first == second
    assert other.shrink_start == first.expand_start + first.num_expand_items


def test_a_module_that_an_adapter_does_not_target_has_no_items():
    group = GroupTable(32, [32, 16], 2, CPU)
    group.modules[1].set(1, [Entry(a_offset=0, b_offset=0, r=4, k=2, scale=1.0)])
    grouping = Grouping(4)
    grouping.fill([0, 1], {0: 8, 1: 8})

    shrink, expand = lists_of(plan_work([group], grouping, BLOCKING))

    assert {row // ENTRIES for row in shrink[:, 0].tolist()} == {2 + 1}
    assert {row // ENTRIES for row in expand[:, 0].tolist()} == {2 + 1}


def test_a_step_without_adapters_has_no_work():
    case = make_case(32, [32], [[(4, 2)]])

    work = plan_work([case.group], case.grouping([-1, -1]), BLOCKING)

    assert len(work.items) == 0
    assert work.heads.tolist() == [[[0, 0, 0, 0], [0, 0, 0, 0]]]


def test_alignment_is_what_all_widths_allow():
    group = GroupTable(576, [96, 64], 2, CPU)
    group.modules[0].set(0, [Entry(a_offset=0, b_offset=0, r=8, k=8, scale=1.0)])
    grouping = Grouping(4)
    grouping.fill([0], {0: 64})

    (work,) = plan_work([group], grouping, BLOCKING).groups

    assert (work.in_alignment, work.out_alignment) == (8, 4)  # of 576 / 8 = 72, and of 96 / 8 = 12
