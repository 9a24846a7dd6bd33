"""The adapters that kernels can reach: one arena, one table per linear layer, one slot per adapter. Knows no names.

Nothing here locks. The manager calls what changes the books under its lock, and `fill`, `read` and `clear`, which move
memory that nobody else owns, outside of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from gralora_kernels.packing import ROW_MAJOR, Packing
from gralora_kernels.tables import ARENA_SLACK, GroupTable, ModuleTable, SlotRows, TableSet
from gralora_runtime.adapters.checkpoint.loader import AdapterLayout, LoadedAdapter
from gralora_runtime.adapters.checkpoint.recipe import Affines, Layout
from gralora_runtime.adapters.checkpoint.remembered import remembered
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.residency.arena import ArenaAllocator
from gralora_runtime.adapters.residency.eviction import WORTHLESS, Segment
from gralora_runtime.adapters.residency.shared_inputs import group_siblings
from gralora_runtime.adapters.residency.transfer import Spread, Transfer, transfer_to
from gralora_runtime.memory import lazy_zeros

AHEAD_BYTES = 256 << 20  # of a CPU's pool, written before they are needed
TOUCHED_BYTES = 256 << 10  # at a time


@dataclass(slots=True, eq=False, kw_only=True)
class Resident:
    """One stay of an adapter in a slot. The generation tells it from earlier ones in the same slot, and from itself
    before it was moved."""

    slot: int
    generation: int
    offset: int
    layout: AdapterLayout
    worth: float = WORTHLESS  # of staying: see `worth_after_use`
    leases: int = 0
    pinned: bool = False
    draining: bool = False  # a waiting adapter needs this room: no new leases
    leaving: bool = False  # being read back and zeroed, to be somewhere else

    @property
    def open(self) -> bool:
        return not (self.draining or self.leaving)

    @property
    def still(self) -> bool:
        """Nobody uses it, and nobody does anything with it."""
        return self.leases == 0 and not self.leaving

    @property
    def idle(self) -> bool:
        return self.still and not self.pinned


class AdapterPool:
    """`arena` and `tables` are what the kernels read; a slot's table rows are all zero while it holds no adapter."""

    def __init__(
        self,
        *,
        modules: Sequence[ModuleShape],
        device: torch.device,
        dtype: torch.dtype,
        pool_bytes: int,
        max_slots: int,
        packing: Packing = ROW_MAJOR,
        transfer: Transfer | None = None,
    ) -> None:
        self.max_slots = max_slots
        self.packing = packing if dtype == torch.float32 else replace(packing, keeps_16_bit=False)
        self.ranges = ArenaAllocator(pool_bytes // dtype.itemsize)
        self.arena = lazy_zeros([self.ranges.numel + ARENA_SLACK], dtype, device)
        siblings = group_siblings(modules)
        shapes = [(group[0].in_features, [module.out_features for module in group]) for group in siblings]
        self.table_set = TableSet(shapes, max_slots, device)
        names = [tuple(module.name for module in group) for group in siblings]
        # By the names of a group's modules, and by a module's name.
        self.groups: dict[tuple[str, ...], GroupTable] = dict(zip(names, self.table_set.groups, strict=True))
        in_order = list(chain.from_iterable(names))
        self.tables: dict[str, ModuleTable] = dict(zip(in_order, self.table_set.modules, strict=True))
        self._positions = {name: position for position, name in enumerate(in_order)}
        self._slot_rows = remembered(self._rows_of)
        self.transfer = transfer or transfer_to(device)
        self._used_end = self._touched_end = 0  # elements: what lies behind was never written
        self._blank_rows = list(_pieces(self.table_set)) if device.type == "cpu" else []  # of tables
        self._generations = [0] * max_slots
        self._free_slots = list(range(max_slots))  # a heap: low slots first
        self._residents: dict[int, Resident] = {}  # by slot: everything that owns a range
        self._by_digest: dict[str, Resident] = {}  # those that were filled

    @property
    def spread(self) -> Spread:
        """Who may work on what will be placed here."""
        return self.transfer.spread

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def total_bytes(self) -> int:
        return self.ranges.numel * self.arena.element_size()

    @property
    def used_bytes(self) -> int:
        return (self.ranges.numel - self.ranges.free_numel) * self.arena.element_size()

    @property
    def num_leases(self) -> int:
        return sum(resident.leases for resident in self._residents.values())

    def generation(self, slot: int) -> int:
        """How often the slot has been used. A lease is stale when its generation is not this one."""
        return self._generations[slot]

    def find(self, digest: str) -> Resident | None:
        return self._by_digest.get(digest)

    def place(self, adapter: LoadedAdapter) -> Resident | None:
        """Put an adapter into the first range that is free, or return None. For callers that need no eviction."""
        offset = self.ranges.find(adapter.layout.numel) if self._free_slots else None
        if offset is None:
            return None
        resident = self.reserve(adapter.layout, offset)
        self.fill(resident, adapter)
        self.publish(resident)
        return resident

    def evict(self, resident: Resident) -> None:
        """Forget an adapter and leave only zeros behind."""
        self.withdraw(resident)
        self.clear(resident)
        self.release(resident)

    def reserve(self, layout: AdapterLayout, offset: int) -> Resident:
        """Take a slot and the range at `offset`, which must be free."""
        self._take(offset, layout.numel)
        slot = heapq.heappop(self._free_slots)
        self._generations[slot] += 1
        resident = Resident(slot=slot, generation=self._generations[slot], offset=offset, layout=layout)
        self._residents[slot] = resident
        return resident

    def touch_ahead(self) -> bool:
        """Write a piece of the memory that was never used, as the zeros that it is; False if enough of it is written.

        The system gives memory when it is first written, which may take thirty times as long as writing. An adapter's
        rows are all over the tables: the first one would wait for them all.
        """
        if self._used_end == 0 and self._blank_rows:
            _write_zeros(self._blank_rows.pop())
            return True
        per_element = self.arena.element_size()
        end = min(self._used_end + AHEAD_BYTES // per_element, self.ranges.numel)
        start = max(self._touched_end, self._used_end)
        if self.arena.device.type != "cpu" or start >= end:
            return False
        self._touched_end = min(start + TOUCHED_BYTES // per_element, end)
        _write_zeros(self.arena[start : self._touched_end].view(torch.uint8).numpy())
        return True

    def fill(self, resident: Resident, adapter: LoadedAdapter) -> None:
        """The weights, then the table rows that point at them."""
        rows = self._slot_rows(resident.layout.modules, self._positions, resident.layout.affines)
        with self.transfer.moving():
            self.transfer.upload(self._range(resident), adapter.blob)
            self.table_set.put(resident.slot, rows, offset=resident.offset)
            self.transfer.write_rows(self.table_set, resident.slot)

    def publish(self, resident: Resident) -> None:
        """From now on `find` knows it."""
        assert resident.layout.digest not in self._by_digest, resident.layout.digest
        self._by_digest[resident.layout.digest] = resident

    def withdraw(self, resident: Resident) -> None:
        """`find` knows it no more; slot and range stay taken."""
        assert resident.leases == 0, f"slot {resident.slot} has {resident.leases} leases"
        del self._by_digest[resident.layout.digest]
        resident.leaving, resident.pinned = True, False

    def read(self, resident: Resident) -> LoadedAdapter:
        """Copy an adapter back to host memory."""
        with self.transfer.moving():
            return LoadedAdapter(resident.layout, self.transfer.download(self._range(resident)))

    def clear(self, resident: Resident) -> None:
        """Zero the table rows, so that no kernel finds the weights, then the weights."""
        assert resident.leases == 0, f"slot {resident.slot} has {resident.leases} leases"
        with self.transfer.moving(after_steps=True):
            self.table_set.clear(resident.slot)
            self.transfer.write_rows(self.table_set, resident.slot)
            self.transfer.zero(self._range(resident))

    def relocate(self, resident: Resident, offset: int) -> None:
        """Give a cleared range back and take the one at `offset` in its place; `fill` follows.

        The slot stays, because a full table has no other one to give. Its generation does not: between the two places
        its rows were blank, so whoever still holds the old one must be refused.
        """
        assert resident.leaving, f"slot {resident.slot} is open"
        self.ranges.free(resident.offset)
        self._take(offset, resident.layout.numel)
        self._generations[resident.slot] += 1
        resident.offset, resident.generation = offset, self._generations[resident.slot]

    def release(self, resident: Resident) -> None:
        """Give slot and range back."""
        del self._residents[resident.slot]
        self.ranges.free(resident.offset)
        heapq.heappush(self._free_slots, resident.slot)

    def residents(self) -> Iterator[Resident]:
        """Everything that owns a range, also what is being filled or cleared."""
        return iter(self._residents.values())

    def segments(
        self,
        usable: Collection[Resident],
        *,
        movable: Collection[Resident] = (),
        blocked: Sequence[range] = (),
    ) -> list[Segment[Resident]]:
        """The arena from end to end. `usable` owners may be evicted; free ranges that touch `blocked` stay free."""
        found = [
            Segment(
                offset=resident.offset,
                numel=resident.layout.numel,
                owner=resident,
                worth=resident.worth,
                usable=resident in usable,
                movable=resident in movable,
            )
            for resident in self._residents.values()
        ]
        for offset, numel in self.ranges.free_ranges():
            free = all(offset >= kept.stop or offset + numel <= kept.start for kept in blocked)
            found.append(Segment(offset=offset, numel=numel, owner=None, worth=WORTHLESS, usable=free))
        return sorted(found, key=lambda segment: segment.offset)

    def check_integrity(self) -> None:
        """Every slot and every element is either free or owned by exactly one stay."""
        self.ranges.check_integrity()
        owned = sum(resident.layout.numel for resident in self._residents.values())
        assert owned + self.ranges.free_numel == self.ranges.numel, f"{owned} elements owned"
        assert sorted([*self._free_slots, *self._residents]) == list(range(self.max_slots)), "slots"
        for digest, resident in self._by_digest.items():
            assert resident.layout.digest == digest, f"slot {resident.slot} is filed under another digest"
            assert self._residents[resident.slot] is resident, f"slot {resident.slot} was reused"
            assert resident.offset + resident.layout.numel <= self._used_end, f"slot {resident.slot} is not in use"
            assert self._generations[resident.slot] == resident.generation, f"slot {resident.slot}"

    def _rows_of(self, modules: Layout, positions: Mapping[str, int], affines: Affines) -> SlotRows:
        return self.table_set.rows_of(
            {positions[module]: entries for module, entries in modules},
            {positions[module]: offset for module, offset in affines},
        )

    def _take(self, offset: int, numel: int) -> None:
        self.ranges.allocate_at(offset, numel)
        self._used_end = max(self._used_end, offset + numel)

    def _range(self, resident: Resident) -> torch.Tensor:
        return self.arena[resident.offset : resident.offset + resident.layout.numel]


def _pieces(tables: TableSet) -> Iterator[npt.NDArray[np.uint8]]:
    """Of the memory of all rows."""
    rows = tables.rows
    for array in (rows.host_index, rows.host_scale, rows.host_storage, rows.host_affine):
        flat = array.reshape(-1).view(np.uint8)
        yield from (flat[start : start + TOUCHED_BYTES] for start in range(0, len(flat), TOUCHED_BYTES))


def _write_zeros(target: npt.NDArray[np.uint8]) -> None:
    """In the calling thread alone, as numpy does: torch would start a team of threads."""
    target.fill(0)
