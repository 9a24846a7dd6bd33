"""A step's work lists in a few numbers per segment: the device writes the lists themselves. Plain numpy.

`plan_work` makes an item for every piece of every segment in every layer: tens of thousands, and ten milliseconds. Here
the host only says where the items of each segment begin in each list and which pieces they come from. Pieces are those
of an adapter's layout, known since it was loaded. So a step costs the host some numpy calls over [lists, segments].

Layers whose slots had equal layouts in all that was seen so far are of one class, and share their lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import GroupTable
from gralora_kernels.work import ITEM, WIDEST, Blocking, Int32s, Pieces, pieces_of

PHASES = ("split_shrink", "shrink", "expand", "narrow_expand")
# Rows of `ListPlanner._facts`: for each phase how many pieces and the first of them, then three facts of `Pieces`.
COUNT, FIRST, COLUMNS, IN_ALIGNMENT, OUT_ALIGNMENT = 0, 4, 8, 9, 10
MAX_PATTERNS = 1 << 12  # then all are forgotten, and those in use seen anew
MAX_PIECES = 1 << 20

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What one step's lists are made from, and what its launches need to know. Each class has two: shrink, expand."""

    num_tokens: int
    num_items: int
    order: Int32s  # [adapted tokens]
    segments: Int32s  # [segments, 4]: slot, first position in order, tokens, tiles
    parts: Int32s  # [lists, segments, 4]: first item, first piece, pieces
    heads: (
        Int32s  # [groups, 2, 4]: first item and number of items of each group's shrink and expand; 16 bytes per launch
    )
    columns: Int64s  # [groups]: of u
    in_alignments: Int64s  # [groups]: elements, as in `Pieces`
    out_alignments: Int64s  # [groups]
    tile_tokens: int
    is_split: bool

    @property
    def num_columns(self) -> int:
        """Columns of u in the group that needs most."""
        return int(self.columns.max(initial=0))


class ListPlanner:
    """For the groups of one model.

    `pieces` [pieces, ITEM]: of slot 0, all that were seen so far. It only grows, but when `forgotten` is counted up:
    then it began anew.
    """

    def __init__(self, groups: Sequence[GroupTable], blocking: Blocking) -> None:
        self._groups = tuple(groups)
        self._blocking = blocking
        kinds: dict[object, int] = {}
        self._kinds = [kinds.setdefault(group.kind, len(kinds)) for group in groups]
        # Each is counted up when a slot's layout changes in one of the groups that share it.
        self._counters = list({id(group.versions): group.versions for group in groups}.values())
        self.forgotten = 0
        self._forget()

    def plan(self, grouping: Grouping) -> Listing:
        """The lists of `plan_work`, where each group's are the same item for item."""
        slots, lengths = grouping.slots, np.diff(grouping.starts)
        self._look_at(slots)
        tile_tokens = self._blocking.tile_tokens(grouping.num_adapted, len(slots))
        is_split = self._blocking.splits(grouping.num_adapted)
        tiles = -(-lengths // tile_tokens)
        segments = np.empty((len(slots), 4), np.int32)
        for field, values in enumerate((slots, grouping.starts[:-1], lengths, tiles)):
            segments[:, field] = values
        layouts = self._layout_of[:, self._pattern_of[slots]]  # [classes, segments]
        parts = np.zeros((len(layouts), 2, len(slots), 4), np.int32)
        phases = self._blocking.shrink_phase(grouping.num_adapted), self._blocking.expand_phase(grouping.num_adapted)
        for place, phase in enumerate(phases):
            parts[:, place, :, 1] = self._facts[FIRST + PHASES.index(phase)][layouts]
            parts[:, place, :, 2] = self._facts[COUNT + PHASES.index(phase)][layouts]
        numbers = parts[..., 2] * tiles
        ends = numbers.cumsum().reshape(numbers.shape)
        parts[..., 0] = ends - numbers
        heads = np.zeros((len(numbers), 2, 4), np.int32)
        if len(slots):
            heads[..., 0] = parts[..., 0, 0]
            heads[..., 1] = ends[..., -1] - heads[..., 0]
        return Listing(
            num_tokens=grouping.num_tokens,
            num_items=int(ends[-1, -1, -1]) if len(slots) else 0,
            order=grouping.order,
            segments=segments,
            parts=parts.reshape(2 * len(layouts), len(slots), 4),
            heads=heads[self._class_of],
            columns=self._facts[COLUMNS][layouts].max(axis=1, initial=0)[self._class_of],
            in_alignments=self._facts[IN_ALIGNMENT][layouts].min(axis=1, initial=WIDEST)[self._class_of],
            out_alignments=self._facts[OUT_ALIGNMENT][layouts].min(axis=1, initial=WIDEST)[self._class_of],
            tile_tokens=tile_tokens,
            is_split=is_split,
        )

    def _look_at(self, slots: Int32s) -> None:
        """Know the pattern of each of these slots: its layouts in all groups."""
        versions = sum(counter[slots] for counter in self._counters)
        changed = slots[self._version_of[slots] != versions]
        if not len(changed):
            return
        if len(self._patterns) + len(changed) > MAX_PATTERNS or len(self.pieces) > MAX_PIECES:
            self._forget()
            self.forgotten += 1
            changed = slots
        for slot in changed.tolist():
            self._pattern_of[slot] = self._pattern(slot)
            self._version_of[slot] = sum(counter[slot] for counter in self._counters)

    def _forget(self) -> None:
        max_slots = self._groups[0].max_slots
        self._layouts: dict[tuple[int, bytes], int] = {}
        self._patterns: dict[bytes, int] = {}
        self.pieces: Int32s = np.zeros((0, ITEM), np.int32)
        self._facts: Int64s = np.zeros((OUT_ALIGNMENT + 1, 0), np.int64)  # by fact and layout
        self._class_of: Int64s = np.array(self._kinds)  # by group
        self._layout_of: Int64s = np.zeros((max(self._kinds) + 1, 0), np.int64)  # by class and pattern
        self._pattern_of: Int64s = np.zeros(max_slots, np.int64)
        self._version_of: Int64s = np.full(max_slots, -1, np.int64)

    def _pattern(self, slot: int) -> int:
        known = self._layouts
        layouts = np.array([known[key] if key in known else self._layout(*key) for key in self._keys(slot)])
        name = layouts.tobytes()
        if name not in self._patterns:
            # Groups stay of one class if the new pattern, too, has one layout for all of them.
            both = np.stack([self._class_of, layouts])
            _, first, new_class = np.unique(both, axis=1, return_index=True, return_inverse=True)
            self._layout_of = np.column_stack([self._layout_of[self._class_of[first]], layouts[first]])
            self._class_of = new_class.reshape(-1)
            self._patterns[name] = len(self._patterns)
        return self._patterns[name]

    def _keys(self, slot: int) -> list[tuple[int, bytes]]:
        return [(kind, group.layouts[slot]) for kind, group in zip(self._kinds, self._groups, strict=True)]

    def _layout(self, kind: int, layout: bytes) -> int:
        """Of a layout that is seen for the first time."""
        self._add(pieces_of(self._groups[self._kinds.index(kind)].kind, layout, self._blocking))
        return self._layouts.setdefault((kind, layout), len(self._layouts))

    def _add(self, pieces: Pieces) -> None:
        lists = [getattr(pieces, phase) for phase in PHASES]
        counts = [len(one) for one in lists]
        firsts = len(self.pieces) + np.cumsum([0, *counts[:-1]])
        self.pieces = np.concatenate([self.pieces, *lists])
        facts = (*counts, *firsts, pieces.num_columns, pieces.in_alignment, pieces.out_alignment)
        self._facts = np.column_stack([self._facts, facts])
