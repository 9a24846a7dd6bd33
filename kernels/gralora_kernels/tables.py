"""Where in the arena each pool slot keeps its matrices, per linear layer, and which layers are served together.

Knows no names, nor who fills a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

ENTRIES = 2  # a hybrid adapter is two entries: GraLoRA (r, k) and a plain pair (hybrid_r, k=1)
ALIGNMENT = 16  # elements: every matrix starts at a multiple of it
ARENA_SLACK = 16  # elements behind the last matrix of an arena that kernels may read, never use


class Storage(IntEnum):
    """What a matrix's elements are. In an arena of 4-byte elements two of 16 bits share one of the arena's."""

    NATIVE = 0  # the arena's own
    FLOAT16 = 1
    BFLOAT16 = 2


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


class GroupTable:
    """Linear layers that read the same input (q, k and v; gate and up), or one alone. Kernels serve a group at once.

    The group's output is its modules' outputs side by side: module m has the columns from `column_starts[m]` on. Index
    and scale of all modules are one tensor each; a `ModuleTable` is a view of its part.
    """

    def __init__(self, in_features: int, out_features: Sequence[int], max_slots: int, device: torch.device) -> None:
        self.in_features = in_features
        self.column_starts = tuple(accumulate(out_features, initial=0))[:-1]
        self.out_features = sum(out_features)
        self.max_slots = max_slots
        self.kind = (in_features, tuple(out_features), max_slots)
        shape = (len(out_features), max_slots, ENTRIES)
        self.host_index: npt.NDArray[np.int64] = np.zeros((*shape, 4), np.int64)
        self.host_scale: npt.NDArray[np.float32] = np.zeros(shape, np.float32)
        self.host_storage: npt.NDArray[np.int64] = np.zeros(shape, np.int64)  # `Storage`, of A and of B
        self.index = torch.from_numpy(self.host_index).to(device)  # [modules, max_slots, ENTRIES, 4]
        self.scale = torch.from_numpy(self.host_scale).to(device)  # [modules, max_slots, ENTRIES]
        # By slot: r and k of every module and entry, as bytes. Equal for slots, and layers, that need the same work.
        self.layouts = [self._layout(0)] * max_slots
        self.modules = tuple(
            ModuleTable(in_features, out, max_slots, device, group=self, position=m)
            for m, out in enumerate(out_features)
        )

    def note_layout(self, slot: int) -> None:
        """A module's entries of this slot have changed."""
        self.layouts[slot] = self._layout(slot)

    def _layout(self, slot: int) -> bytes:
        return self.host_index[:, slot, :, 2:].tobytes()


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
        self.host_index = self.group.host_index[position]  # int64 [max_slots, ENTRIES, 4]
        self.host_scale = self.group.host_scale[position]  # float32 [max_slots, ENTRIES]
        self.host_storage = self.group.host_storage[position]  # int64 [max_slots, ENTRIES]
        self.index = self.group.index[position]
        self.scale = self.group.scale[position]
        self._shared = device.type == "cpu"

    def set(self, slot: int, entries: Sequence[Entry]) -> None:
        """Make `slot` hold these entries. Raises ValueError for a layout that the kernels cannot compute."""
        if not 0 <= slot < self.max_slots:
            raise ValueError(f"slot {slot} is outside 0..{self.max_slots - 1}")
        if len(entries) > ENTRIES:
            raise ValueError(f"an adapter has at most {ENTRIES} entries per module, got {len(entries)}")
        for entry in entries:
            self._check(entry)
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
            if offset < 0 or offset % ALIGNMENT:
                raise ValueError(f"{name} must be a multiple of {ALIGNMENT}, got {offset}")

    def _upload(self, slot: int) -> None:
        if not self._shared:
            self.index[slot].copy_(torch.from_numpy(self.host_index[slot]))
            self.scale[slot].copy_(torch.from_numpy(self.host_scale[slot]))
