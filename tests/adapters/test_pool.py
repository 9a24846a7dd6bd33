"""Slots, tables and arena agree, and an adapter that left has left nothing."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import MODULES, edit_tensors, write_gralora, write_lora

from gralora_kernels.packing import Packing
from gralora_kernels.tables import Storage
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter, load
from gralora_runtime.adapters.residency import pool as pool_module
from gralora_runtime.adapters.residency.pool import AdapterPool, Resident

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedAdapter]:
    """Of four sizes."""
    root = tmp_path_factory.mktemp("adapters")
    paths = [
        write_gralora(root / "a", r=8, k=2),
        write_gralora(root / "b", r=4, k=4, hybrid_r=2),
        write_lora(root / "c", r=4),
        write_lora(root / "d", r=13),
    ]
    return [load(path.name, path, MODULES, torch.float32, max_width=64) for path in paths]


def pool_of(num_bytes: int, max_slots: int = 4) -> AdapterPool:
    return AdapterPool(modules=MODULES, device=CPU, dtype=torch.float32, pool_bytes=num_bytes, max_slots=max_slots)


def is_blank(pool: AdapterPool, slot: int) -> bool:
    return not any(
        table.index[slot].any() or table.scale[slot].any() or table.host_storage[slot].any()
        for table in pool.tables.values()
    )


def place(pool: AdapterPool, adapter: LoadedAdapter) -> Resident:
    resident = pool.place(adapter)
    assert resident is not None
    return resident


def test_a_new_pool_is_blank(adapters: list[LoadedAdapter]) -> None:
    pool = pool_of(1000)

    assert pool.total_bytes == 960  # whole ranges of 16 elements
    assert pool.used_bytes == 0
    assert all(is_blank(pool, slot) for slot in range(4))
    assert pool.find("") is None
    pool.check_integrity()


def test_tables_point_at_the_weights(adapters: list[LoadedAdapter]) -> None:
    pool = pool_of(1 << 20)
    for adapter in adapters:
        resident = place(pool, adapter)
        assert pool.find(adapter.digest) is resident
        for module, entries in adapter.layout.modules:
            table = pool.tables[module]
            for i, entry in enumerate(entries):
                a_offset, b_offset, r, k = table.index[resident.slot, i].tolist()
                assert (entry.r, entry.k) == (r, k)
                a_numel, b_numel = r * table.in_features, r * table.out_features
                assert torch.equal(adapter.blob[entry.a_offset :][:a_numel], pool.arena[a_offset:][:a_numel])
                assert torch.equal(adapter.blob[entry.b_offset :][:b_numel], pool.arena[b_offset:][:b_numel])
                assert entry.scale == table.scale[resident.slot, i]
    pool.check_integrity()


def test_modules_that_an_adapter_does_not_target_stay_blank(adapters: list[LoadedAdapter], tmp_path: Path) -> None:
    """In a slot, too, that an adapter for all modules had before."""
    part = write_gralora(tmp_path / "part", MODULES[:2], target_modules=[module.name for module in MODULES[:2]])
    pool = pool_of(1 << 20, max_slots=1)
    pool.evict(place(pool, adapters[0]))

    resident = place(pool, load("part", part, MODULES, torch.float32, max_width=64))

    targeted = {name for name, table in pool.tables.items() if table.width(resident.slot)}
    assert {module.name for module in MODULES[:2]} == targeted
    assert sum(table.index[resident.slot].any().item() for table in pool.tables.values()) == 2


def test_reading_back_gives_the_same_adapter(adapters: list[LoadedAdapter]) -> None:
    pool = pool_of(1 << 20)
    residents = [place(pool, adapter) for adapter in adapters]

    for adapter, resident in zip(adapters, residents, strict=True):
        copy = pool.read(resident)
        assert torch.equal(adapter.blob, copy.blob)
        assert adapter.layout is copy.layout


def test_an_evicted_adapter_leaves_only_zeros(adapters: list[LoadedAdapter]) -> None:
    pool = pool_of(1 << 20)
    residents = [place(pool, adapter) for adapter in adapters]
    others = pool.arena.clone()
    gone = residents[1]
    others[gone.offset : gone.offset + gone.layout.numel] = 0
    pool.evict(gone)

    assert torch.equal(others, pool.arena)
    assert is_blank(pool, gone.slot)
    assert not is_blank(pool, residents[0].slot)
    assert pool.find(adapters[1].digest) is None
    pool.check_integrity()


def test_a_slot_that_held_16_bits_holds_float32_afterwards(adapters: list[LoadedAdapter], tmp_path: Path) -> None:
    """The next adapter's weights must not be read as the last one's were stored, nor a copy lose bits."""
    path = write_gralora(tmp_path / "narrow", r=4, k=2)
    edit_tensors(path, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    narrow = load("narrow", path, MODULES, torch.float32, max_width=64, packing=Packing(keeps_16_bit=True))
    pool = pool_of(1 << 20)

    resident = place(pool, narrow)
    assert all(table.host_storage[resident.slot, 0] == Storage.BFLOAT16 for table in pool.tables.values())
    assert torch.equal(pool.read(resident).blob.view(torch.int32), narrow.blob.view(torch.int32))
    pool.evict(resident)
    assert is_blank(pool, resident.slot)
    assert place(pool, adapters[0]).slot == resident.slot
    assert all((table.host_storage[resident.slot] == Storage.NATIVE).all() for table in pool.tables.values())


def test_every_reuse_of_a_slot_is_another_generation(adapters: list[LoadedAdapter]) -> None:
    pool = pool_of(1 << 20, max_slots=1)

    generations = []
    for adapter in adapters:
        resident = place(pool, adapter)
        assert resident.slot == 0
        assert resident.generation == pool.generation(0)
        generations.append(resident.generation)
        pool.evict(resident)
    assert generations == [1, 2, 3, 4]


def test_a_leased_adapter_cannot_be_evicted(adapters: list[LoadedAdapter]) -> None:
    pool = pool_of(1 << 20)
    resident = place(pool, adapters[0])
    resident.leases = 1

    with pytest.raises(AssertionError):
        pool.evict(resident)
    with pytest.raises(AssertionError):
        pool.clear(resident)
    assert torch.equal(adapters[0].blob, pool.read(resident).blob)


def test_without_a_slot_or_without_room_nothing_is_placed(adapters: list[LoadedAdapter]) -> None:
    narrow = pool_of(adapters[0].num_bytes)
    few = pool_of(1 << 20, max_slots=1)
    for pool in (narrow, few):
        place(pool, adapters[0])

        assert pool.place(adapters[1]) is None
        pool.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_random_walks_keep_the_books_and_the_weights(adapters: list[LoadedAdapter], seed: int) -> None:
    rng = random.Random(seed)
    pool = pool_of(3 * max(adapter.num_bytes for adapter in adapters), max_slots=3)
    placed: dict[str, Resident] = {}
    for _ in range(60):
        adapter = rng.choice(adapters)
        if adapter.digest in placed:
            pool.evict(placed.pop(adapter.digest))
        elif resident := pool.place(adapter):
            placed[adapter.digest] = resident
        pool.check_integrity()
        for other in adapters:
            if other.digest in placed:
                assert torch.equal(other.blob, pool.read(placed[other.digest]).blob)
    for resident in placed.values():
        pool.evict(resident)

    assert not pool.arena.any()
    assert pool.used_bytes == 0


@pytest.mark.parametrize("cells", [1, 3, 40])
def test_an_adapter_that_was_moved_is_the_same_elsewhere_and_a_new_generation(
    adapters: list[LoadedAdapter], cells: int
) -> None:
    """By less than its own size too: then the two places overlap."""
    pool = pool_of(1 << 20)
    adapter, offset = adapters[0], 16 * cells
    moved, other = place(pool, adapter), place(pool, adapters[1])
    pool.evict(other)
    slot, generation = moved.slot, moved.generation

    moved.leaving = True
    copy = pool.read(moved)
    pool.clear(moved)
    assert not pool.arena.any()
    assert is_blank(pool, slot)
    pool.relocate(moved, offset)
    pool.fill(moved, copy)

    assert (slot, offset) == (moved.slot, moved.offset)
    assert generation < moved.generation == pool.generation(slot)
    assert torch.equal(adapter.blob, pool.read(moved).blob)
    assert not pool.arena[:offset].any()
    assert not pool.arena[offset + adapter.layout.numel :].any()
    for module, entries in adapter.layout.modules:
        a_offset = pool.tables[module].index[slot, 0, 0]
        assert entries[0].a_offset + offset == a_offset
    pool.check_integrity()


def test_only_who_is_leaving_can_be_moved(adapters: list[LoadedAdapter]) -> None:
    pool = pool_of(1 << 20)
    resident = place(pool, adapters[0])

    with pytest.raises(AssertionError):
        pool.relocate(resident, 1 << 12)
    pool.check_integrity()


def test_memory_is_written_ahead_of_its_use_and_no_weight_changes(
    adapters: list[LoadedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "AHEAD_BYTES", 4000)
    monkeypatch.setattr(pool_module, "TOUCHED_BYTES", 1000)
    zeroed: list[int] = []
    pool = pool_of(1 << 20)
    write = pool_module._write_zeros
    monkeypatch.setattr(pool_module, "_write_zeros", lambda target: (zeroed.append(len(target)), write(target)))

    while pool.touch_ahead():
        pass
    tables = pool.table_set.rows
    arrays = (tables.host_index, tables.host_scale, tables.host_storage, tables.host_affine)
    assert sum(zeroed) == sum(array.nbytes for array in arrays) + 4000  # up to the limit and no further
    assert max(zeroed) == 1000
    first = place(pool, adapters[0])
    while pool.touch_ahead():
        pass
    first.leaving = True
    copy = pool.read(first)
    pool.clear(first)
    pool.relocate(first, 16 * 1000)  # far behind all that was used, or written
    pool.fill(first, copy)
    second = place(pool, adapters[1])
    while pool.touch_ahead():
        pass
    for resident, adapter in ((first, adapters[0]), (second, adapters[1])):
        assert torch.equal(adapter.blob, pool.read(resident).blob)
    pool.check_integrity()


def test_tables_that_hold_an_adapter_are_not_prepared(
    adapters: list[LoadedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come before all of them were."""
    monkeypatch.setattr(pool_module, "TOUCHED_BYTES", 64)
    pool = pool_of(1 << 20)
    assert pool.touch_ahead()
    resident = place(pool, adapters[0])
    rows = pool.table_set.rows
    before = [array.copy() for array in (rows.host_index, rows.host_scale, rows.host_storage, rows.host_affine)]
    assert before[0].any()
    assert before[1].any()

    while pool.touch_ahead():
        pass

    after = (rows.host_index, rows.host_scale, rows.host_storage, rows.host_affine)
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.equal(adapters[0].blob, pool.read(resident).blob)


def test_no_more_memory_is_written_than_there_is(adapters: list[LoadedAdapter]) -> None:
    pool = pool_of(adapters[0].num_bytes)
    while pool.touch_ahead():
        pass
    place(pool, adapters[0])
    assert not pool.touch_ahead()
