"""Where in the arena each pool slot keeps its matrices, per linear layer, and which layers are served together.

Knows no names, nor who fills a slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gralora_kernels.alignment import ALIGNMENT

ENTRIES = 2  # a hybrid adapter is two entries: GraLoRA (r, k) and a plain pair (hybrid_r, k=1)
ARENA_SLACK = 16  # elements behind the last matrix of an arena that kernels may read, never use
NONE: Mapping[int, int] = MappingProxyType({})


class Storage(IntEnum):
    """What a matrix's elements are. In an arena of 4-byte elements two of 16 bits share one of the arena's."""

    NATIVE = 0  # the arena's own
    FLOAT16 = 1
    BFLOAT16 = 2


DTYPES = {Storage.FLOAT16: torch.float16, Storage.BFLOAT16: torch.bfloat16}  # of what is not as the arena is


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One packed pair: `Ap [r, in]` at `a_offset` and `Bp [r, out]` at `b_offset` of the arena (in its elements)."""

    a_offset: int
    b_offset: int
    r: int
    k: int
    scale: float
    storage: Storage = Storage.NATIVE

    @property
    def width(self) -> int:
        """Columns of the intermediate u that the pair needs."""
        return self.r * self.k


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Of some modules: rows (a_offset, b_offset, r, k), scale and storage per slot and entry, and per slot where its
    gains and shifts lie, in host memory and on the device. On the CPU both are the same memory.

    Gains and shifts are two vectors [out] of fp32, one behind the other, in any arena: y = gain * (y + what the entries
    add) + shift. DoRA's magnitudes are gains, biases are shifts. A norm's are its weights and biases. In an embedding's
    place lies a map (`map_numel`), and behind it rows [n, out] of the arena's elements: 0 is the base model's own row,
    1 + i the i-th of these.
    """

    host_index: npt.NDArray[np.int64]  # [modules, max_slots, ENTRIES, 4]
    host_scale: npt.NDArray[np.float32]  # [modules, max_slots, ENTRIES]
    host_storage: npt.NDArray[np.int64]  # [modules, max_slots, ENTRIES]: `Storage`, of A and of B
    host_affine: npt.NDArray[np.int64]  # [modules, max_slots]: 1 + offset of the gains in the arena; 0: there are none
    index: Tensor  # as host_index
    scale: Tensor  # as host_scale
    affine: Tensor  # as host_affine
    versions: npt.NDArray[np.int64]  # [max_slots], of all modules together: grows when a layout of the slot changes
    all_affine: npt.NDArray[np.int64]  # `host_affine` of all modules together

    @classmethod
    def zeros(cls, num_modules: int, max_slots: int, device: torch.device) -> Rows:
        shape = (num_modules, max_slots, ENTRIES)
        index, scale = np.zeros((*shape, 4), np.int64), np.zeros(shape, np.float32)
        affine = np.zeros(shape[:2], np.int64)
        return cls(
            host_index=index,
            host_scale=scale,
            host_storage=np.zeros(shape, np.int64),
            host_affine=affine,
            index=torch.from_numpy(index).to(device),
            scale=torch.from_numpy(scale).to(device),
            affine=torch.from_numpy(affine).to(device),
            versions=np.zeros(max_slots, np.int64),
            all_affine=affine,
        )

    def part(self, first: int, count: int) -> Rows:
        """Views of `count` modules."""
        here = slice(first, first + count)
        return Rows(
            host_index=self.host_index[here],
            host_scale=self.host_scale[here],
            host_storage=self.host_storage[here],
            host_affine=self.host_affine[here],
            index=self.index[here],
            scale=self.scale[here],
            affine=self.affine[here],
            versions=self.versions,
            all_affine=self.all_affine,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRows:
    """What one slot holds in all modules of a `TableSet`. Offsets count from where its adapter begins."""

    index: npt.NDArray[np.int64]  # [modules, ENTRIES, 4]
    scale: npt.NDArray[np.float32]  # [modules, ENTRIES]
    storage: npt.NDArray[np.int64]  # [modules, ENTRIES]
    affine: npt.NDArray[np.int64]  # [modules]
    layouts: tuple[bytes, ...]  # of each group


class TableSet:
    """The tables of all projection groups of a pool. Index and scale of all modules are one tensor each.

    So a slot is set or cleared in all modules by one write on the device of each: `rows.index[:, slot]` and so on.
    That write belongs to whoever owns the order of things on the device; `put` and `clear` change host memory alone.
    """

    def __init__(self, shapes: Sequence[tuple[int, Sequence[int]]], max_slots: int, device: torch.device) -> None:
        """`shapes`: in_features and the modules' out_features of each group. Tables have an even number of slots, one
        more than was asked for if need be."""
        # Of two entries of 4 bytes each: so every group's scales begin at a multiple of 16 bytes, whatever is before
        # them. Triton compiles another variant of a kernel for an address that does not.
        max_slots += max_slots % 2
        counts = [len(outs) for _, outs in shapes]
        self.rows = Rows.zeros(sum(counts), max_slots, device)
        self.groups = tuple(
            GroupTable(in_features, outs, max_slots, device, rows=self.rows.part(first, len(outs)))
            for first, (in_features, outs) in zip(accumulate(counts, initial=0), shapes, strict=False)
        )
        self.modules = tuple(table for group in self.groups for table in group.modules)
        self._nothing = self.rows_of({})

    def rows_of(self, entries: Mapping[int, Sequence[Entry]], affines: Mapping[int, int] = NONE) -> SlotRows:
        """What to `put` so that a slot holds these entries, by position in `modules`; a module not named holds none.
        `affines`: where gains lie, in the same way.

        Raises ValueError for what the kernels cannot compute.
        """
        for position, own in entries.items():
            self.modules[position].check(own)
        shape = (len(self.modules), ENTRIES)
        index, scale, storage = np.zeros((*shape, 4), np.int64), np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        for position, own in entries.items():
            for i, entry in enumerate(own):
                index[position, i] = entry.a_offset, entry.b_offset, entry.r, entry.k
                scale[position, i], storage[position, i] = entry.scale, entry.storage
        affine = np.zeros(len(self.modules), np.int64)
        for position, offset in affines.items():
            _check_offset("affine", offset)
            affine[position] = 1 + offset
        counts = [len(group.modules) for group in self.groups]
        layouts = tuple(
            _layout(index[first : first + count], affine[first : first + count])
            for first, count in zip(accumulate(counts, initial=0), counts, strict=False)
        )
        return SlotRows(index=index, scale=scale, storage=storage, affine=affine, layouts=layouts)

    def put(self, slot: int, rows: SlotRows, *, offset: int = 0) -> None:
        """Make `slot` hold this. `offset` is where in the arena the entries' offsets count from.

        At once: one by one, hundreds of rows would keep the interpreter from everybody else for milliseconds.
        """
        if offset % ALIGNMENT:
            raise ValueError(f"offset must be a multiple of {ALIGNMENT}, got {offset}")
        _check_slot(slot, len(self.rows.versions))
        index = rows.index.copy()
        index[..., :2] += offset * (index[..., 2:3] > 0)  # what holds nothing is all zero
        self.rows.host_index[:, slot] = index
        self.rows.host_scale[:, slot] = rows.scale
        self.rows.host_storage[:, slot] = rows.storage
        self.rows.host_affine[:, slot] = rows.affine + offset * (rows.affine > 0)
        for group, layout in zip(self.groups, rows.layouts, strict=True):
            group.layouts[slot] = layout
        self.rows.versions[slot] += 1

    def write(
        self, slot: int, entries: Mapping[int, Sequence[Entry]], affines: Mapping[int, int] = NONE, *, offset: int = 0
    ) -> None:
        """`put`, for rows that nobody needs twice."""
        self.put(slot, self.rows_of(entries, affines), offset=offset)

    def clear(self, slot: int) -> None:
        """No module has an adapter in this slot."""
        self.put(slot, self._nothing)


class GroupTable:
    """Linear layers that read the same input (q, k and v; gate and up), or one alone. Kernels serve a group at once.

    The group's output is its modules' outputs side by side: module m has the columns from `column_starts[m]` on. Index
    and scale of all modules are one tensor each; a `ModuleTable` is a view of its part. A group that is given no rows
    of a `TableSet` has its own.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        max_slots: int,
        device: torch.device,
        *,
        rows: Rows | None = None,
    ) -> None:
        self.in_features = in_features
        self.column_starts = tuple(accumulate(out_features, initial=0))[:-1]
        self.out_features = sum(out_features)
        self.max_slots = max_slots
        self.kind = (in_features, tuple(out_features), max_slots)
        self.rows = rows or Rows.zeros(len(out_features), max_slots, device)
        self.host_index = self.rows.host_index  # int64 [modules, max_slots, ENTRIES, 4]
        self.index = self.rows.index  # [modules, max_slots, ENTRIES, 4]
        self.scale = self.rows.scale  # [modules, max_slots, ENTRIES]
        self.affine = self.rows.affine  # [modules, max_slots]
        self.versions = self.rows.versions
        # By slot: see `_layout`. Equal for slots, and layers, that need the same work.
        self.layouts = [_layout(self.host_index[:, 0], self.rows.host_affine[:, 0])] * max_slots
        self.modules = tuple(
            ModuleTable(in_features, out, max_slots, device, group=self, position=m)
            for m, out in enumerate(out_features)
        )

    def note_layout(self, slot: int) -> None:
        """What a module holds in this slot has changed."""
        self.layouts[slot] = _layout(self.host_index[:, slot], self.rows.host_affine[:, slot])
        self.versions[slot] += 1


class ModuleTable:
    """One per adaptable linear. Rows are pool slots; they have (a_offset, b_offset, r, k), scale and storage per entry.

    The host copy is what the CPU kernels read. On the CPU `index` and `scale` share its memory. A table that is given
    no group is a group of its own.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        max_slots: int,
        device: torch.device,
        *,
        group: GroupTable | None = None,
        position: int = 0,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.max_slots = max_slots
        self.group = group or GroupTable(in_features, [out_features], max_slots, device)
        rows = self.group.rows
        self.host_index = rows.host_index[position]  # int64 [max_slots, ENTRIES, 4]
        self.host_scale = rows.host_scale[position]  # float32 [max_slots, ENTRIES]
        self.host_storage = rows.host_storage[position]  # int64 [max_slots, ENTRIES]
        self.host_affine = rows.host_affine[position]  # int64 [max_slots]
        self.index = rows.index[position]
        self.scale = rows.scale[position]
        self.affine = rows.affine[position]
        self._shared = device.type == "cpu"

    def set(self, slot: int, entries: Sequence[Entry], affine: int | None = None) -> None:
        """Make `slot` hold these entries, and the gains at `affine`, on the device too.

        Raises ValueError for what the kernels cannot compute.
        """
        _check_slot(slot, self.max_slots)
        self.check(entries)
        if affine is not None:
            _check_offset("affine", affine)
        self.host_affine[slot] = 0 if affine is None else 1 + affine
        self.host_index[slot] = 0
        self.host_scale[slot] = 0
        self.host_storage[slot] = Storage.NATIVE
        for i, entry in enumerate(entries):
            self.host_index[slot, i] = (entry.a_offset, entry.b_offset, entry.r, entry.k)
            self.host_scale[slot, i] = entry.scale
            self.host_storage[slot, i] = entry.storage
        self.group.note_layout(slot)
        self._upload(slot)

    def clear(self, slot: int) -> None:
        """The slot has no adapter for this module."""
        self.set(slot, ())

    def check(self, entries: Sequence[Entry]) -> None:
        """Raises ValueError for what the kernels cannot compute."""
        if len(entries) > ENTRIES:
            raise ValueError(f"an adapter has at most {ENTRIES} entries per module, got {len(entries)}")
        for entry in entries:
            self._check(entry)

    def width(self, slot: int) -> int:
        """Columns of u that the slot needs here."""
        return int((self.host_index[slot, :, 2] * self.host_index[slot, :, 3]).sum())

    def _check(self, entry: Entry) -> None:
        if entry.r < 1 or entry.k < 1:
            raise ValueError(f"r and k must be at least 1, got r={entry.r}, k={entry.k}")
        for name, size in (("r", entry.r), ("in_features", self.in_features), ("out_features", self.out_features)):
            if size % entry.k:
                raise ValueError(f"{name}={size} is not divisible by k={entry.k}")
        for name, offset in (("a_offset", entry.a_offset), ("b_offset", entry.b_offset)):
            _check_offset(name, offset)

    def _upload(self, slot: int) -> None:
        if not self._shared:
            self.index[slot].copy_(torch.from_numpy(self.host_index[slot]))
            self.scale[slot].copy_(torch.from_numpy(self.host_scale[slot]))
            self.affine[slot].copy_(torch.from_numpy(self.host_affine[slot : slot + 1])[0])


def _layout(index: npt.NDArray[np.int64], affine: npt.NDArray[np.int64]) -> bytes:
    """Of one slot in some modules: r and k of each entry, and whether there are gains; `parts_of` reads it."""
    return np.column_stack([index[..., 2:].reshape(len(index), -1), affine > 0]).tobytes()


def parts_of(layout: bytes) -> list[tuple[list[tuple[int, int]], bool]]:
    """Of each module of a group: (r, k) of each entry, and whether there are gains."""
    rows = np.frombuffer(layout, np.int64).reshape(-1, 2 * ENTRIES + 1).tolist()
    return [(list(zip(row[:-1:2], row[1:-1:2], strict=True)), bool(row[-1])) for row in rows]


def _check_offset(name: str, offset: int) -> None:
    if offset < 0 or offset % ALIGNMENT:
        raise ValueError(f"{name} must be a multiple of {ALIGNMENT}, got {offset}")


def _check_slot(slot: int, max_slots: int) -> None:
    if not 0 <= slot < max_slots:
        raise ValueError(f"slot {slot} is outside 0..{max_slots - 1}")
