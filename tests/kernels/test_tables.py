"""ModuleTable refuses what the kernels cannot compute and keeps nothing of a cleared slot."""

from __future__ import annotations

import pytest
import torch

from gralora_kernels.tables import ARENA_SLACK, Entry, GroupTable, ModuleTable, Storage, TableSet

CPU = torch.device("cpu")


def entry(**changes):
    return Entry(**{"a_offset": 0, "b_offset": 16, "r": 8, "k": 2, "scale": 0.5, **changes})


@pytest.mark.parametrize(
    ("slot", "entries", "message"),
    [
        (2, [entry()], "slot 2 is outside 0..1"),
        (0, [entry(), entry(), entry()], "at most 2 entries"),
        (0, [entry(r=0)], "at least 1"),
        (0, [entry(r=9)], "r=9 is not divisible by k=2"),
        (0, [entry(r=9, k=3)], "out_features=64 is not divisible by k=3"),
        (0, [entry(a_offset=8)], "a_offset must be a multiple of 16, got 8"),
        (0, [entry(b_offset=-16)], "b_offset must be a multiple of 16"),
    ],
)
def test_refuses_an_impossible_layout_and_keeps_the_old_one(slot, entries, message):
    table = ModuleTable(48, 64, 2, CPU)
    table.set(0, [entry(scale=2.0)])
    before = table.index.clone()

    with pytest.raises(ValueError, match=message):
        table.set(slot, entries)

    assert torch.equal(before, table.index)


def test_a_cleared_slot_holds_nothing():
    table = ModuleTable(48, 64, 2, CPU)
    table.set(1, [entry(), entry(r=4, k=1)])
    assert table.width(1) == 20

    table.clear(1)

    assert table.width(1) == 0
    assert table.index.count_nonzero() == 0
    assert table.scale.count_nonzero() == 0


def test_a_shorter_layout_leaves_no_second_entry_behind():
    table = ModuleTable(48, 64, 1, CPU)
    table.set(0, [entry(), entry(r=4, k=1)])

    table.set(0, [entry()])

    assert table.index[0].tolist() == [[0, 16, 8, 2], [0, 0, 0, 0]]


def test_a_group_is_one_tensor_and_its_modules_are_views():
    group = GroupTable(48, [64, 16], 3, CPU)
    first, second = group.modules

    second.set(2, [entry(r=4, k=1)])

    assert group.index.shape == (2, 3, 2, 4)
    assert group.index[1, 2, 0].tolist() == [0, 16, 4, 1]
    assert first.host_index.flags.c_contiguous
    assert second.host_index.flags.c_contiguous
    assert second.host_index.ctypes.data == group.index[1].data_ptr()
    assert (group.column_starts, group.out_features) == ((0, 64), 80)
    assert first.index.count_nonzero() == 0


def test_a_layout_tells_slots_of_equal_work():
    group = GroupTable(48, [64, 16], 3, CPU)
    for slot in (0, 2):
        group.modules[0].set(slot, [entry(scale=slot + 1.0, a_offset=16 * slot)])

    assert group.layouts[0] == group.layouts[2] != group.layouts[1]

    group.modules[0].clear(0)

    assert group.layouts[0] == group.layouts[1]


def test_a_module_alone_is_a_group_of_its_own():
    table = ModuleTable(48, 64, 2, CPU)

    assert table.group.modules[0].host_index.ctypes.data == table.host_index.ctypes.data
    assert table.group.kind == (48, (64,), 2)


def test_all_groups_of_a_set_are_views_of_one_tensor():
    tables = TableSet([(48, [64, 16]), (64, [48])], 3, CPU)

    tables.modules[2].set(1, [entry(r=4, k=1)])

    assert tables.rows.index.shape == (3, 4, 2, 4)
    assert tables.rows.scale.shape == (3, 4, 2)
    assert tables.groups[1].index.data_ptr() == tables.rows.index[2].data_ptr()
    assert tables.groups[1].scale.data_ptr() == tables.rows.scale[2].data_ptr()
    assert tables.rows.index[2, 1, 0].tolist() == [0, 16, 4, 1]
    assert [group.in_features for group in tables.groups] == [48, 64]
    assert [table.out_features for table in tables.modules] == [64, 16, 48]
    assert all(group.index.is_contiguous() and group.scale.is_contiguous() for group in tables.groups)


@pytest.mark.parametrize("max_slots", [1, 2, 7])
def test_every_group_begins_where_vectors_do(max_slots):
    """Or Triton would compile a second variant of a kernel, in the middle of serving."""
    tables = TableSet([(48, [64])] * 5, max_slots, CPU)

    for group in tables.groups:
        assert group.max_slots >= max_slots
        assert group.index.shape[1] == group.scale.shape[1] == len(group.layouts) == group.max_slots == group.kind[2]
        assert (group.index.data_ptr() - tables.rows.index.data_ptr()) % 16 == 0
        assert (group.scale.data_ptr() - tables.rows.scale.data_ptr()) % 16 == 0


def test_a_slot_written_at_once_is_the_same_as_module_by_module():
    at_once, one_by_one = (TableSet([(48, [64, 16]), (64, [48])], 3, CPU) for _ in range(2))
    hybrid = [entry(), entry(a_offset=64, r=4, k=1, storage=Storage.BFLOAT16)]
    at_once.write(2, {0: [entry(r=2, k=1)], 1: [entry(r=2, k=1)], 2: [entry()]})  # what must not stay behind
    at_once.write(2, {0: hybrid, 2: [entry(scale=3.0)]}, offset=32)
    one_by_one.modules[0].set(
        2, [entry(a_offset=32, b_offset=48), entry(a_offset=96, b_offset=48, r=4, k=1, storage=Storage.BFLOAT16)]
    )
    one_by_one.modules[2].set(2, [entry(scale=3.0, a_offset=32, b_offset=48)])

    for written, set_alone in zip(at_once.groups, one_by_one.groups, strict=True):
        assert torch.equal(set_alone.index, written.index)
        assert torch.equal(set_alone.scale, written.scale)
        assert set_alone.layouts == written.layouts
        assert (set_alone.rows.host_storage == written.rows.host_storage).all()


def test_a_slot_cleared_at_once_holds_nothing_and_its_neighbours_stay():
    tables = TableSet([(48, [64, 16]), (64, [48])], 3, CPU)
    for slot in range(3):
        tables.write(slot, {position: [entry(storage=Storage.FLOAT16)] for position in range(3)})

    tables.clear(1)

    for held in (tables.rows.index, tables.rows.scale, torch.from_numpy(tables.rows.host_storage)):
        assert held[:, 1].count_nonzero() == 0
        assert all(held[:, slot, 0].any(-1).all() if held.ndim == 4 else held[:, slot, 0].all() for slot in (0, 2))
    assert all(group.layouts[0] == group.layouts[2] != group.layouts[1] for group in tables.groups)


def test_an_offset_that_is_not_aligned_is_refused():
    tables = TableSet([(48, [64])], 1, CPU)

    with pytest.raises(ValueError, match="offset must be a multiple of 16, got 8"):
        tables.write(0, {0: [entry()]}, offset=8)


def test_the_slack_behind_an_arena_is_what_a_panel_may_overrun() -> None:
    """Panels of 16 bits are loaded whole: up to PANEL - 1 elements behind the last row, with the widest vectors too."""
    widest_panel = 2 * 16

    assert 2 * (widest_panel - 1) <= 4 * ARENA_SLACK
