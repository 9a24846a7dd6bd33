"""A step cut into pieces of work for the GPU: lists without an empty item, one per kind of layer. Plain numpy.

A program of a launch does one item. All items are eight int32; the first three say whose: the row of the group's index
(module, slot and entry in one number), the first of some consecutive tokens in `Grouping.order`, and how many. Then,

    shrink  block n, first rank row, first column of the entry's u, first element of the block, plane of u
    expand  first column, end (both of the module's output, within one block of every entry),
            first column of the module's u, first column of the module in the group's output, module's out_features

A shrink is a sum over a block's elements. It is cut into stretches of `Blocking.depth`, whose sums are added up in
order, so that a result is the same however many programs share the work: in a step of few tokens each stretch is an
item of its own, which writes its own plane of u, and expand adds the planes up; elsewhere one item does all of them.

`plan_work` is the specification, and what counts bytes reads. `listing.py` says the same in a few numbers per segment.
Most adapters have the same r and k in all layers, so most layers of a kind share one list; `heads` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import gcd
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import ENTRIES, GroupTable, parts_of

ITEM = 8
WIDEST = 8  # elements that one load may take: 16 bytes of the smallest dtype
Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocking:
    """How large a piece is: tokens, rank rows and elements of a shrink, columns of an expand.

    Steps of at most `split_tokens` adapted tokens have an item for each stretch of `depth` elements, and small tiles;
    tiles of one token if most adapters have no more, as where each row that decodes is another customer's. Those of at
    most `narrow_tokens` have more, narrower items of expands, so that there is one for each processor.
    """

    small_tile: int
    full_tile: int
    rank_rows: int
    columns: int
    narrow_columns: int
    narrow_tokens: int
    depth: int
    split_tokens: int

    def tile_tokens(self, num_adapted: int, num_segments: int) -> int:
        """Of a step with so many adapted tokens, of so many adapters."""
        if not self.splits(num_adapted):
            return self.full_tile
        return 1 if num_adapted < 2 * num_segments else self.small_tile

    def splits(self, num_adapted: int) -> bool:
        """Whether each stretch is an item of its own."""
        return num_adapted <= self.split_tokens

    def expand_phase(self, num_adapted: int) -> str:
        """Which of `Pieces` a step's expands are made of."""
        return "narrow_expand" if num_adapted <= self.narrow_tokens else "expand"

    def shrink_phase(self, num_adapted: int) -> str:
        """Which of `Pieces` a step's shrinks are made of."""
        return "split_shrink" if self.splits(num_adapted) else "shrink"

    def num_planes(self, in_features: int) -> int:
        """The most that a step needs: those of k = 1."""
        return -(-in_features // self.depth)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """The work of one slot in one group, for one tile of tokens."""

    split_shrink: Int32s  # [pieces, ITEM]: an item for each stretch
    shrink: Int32s  # [pieces, ITEM]: one for all of them
    expand: Int32s  # [pieces, ITEM]
    narrow_expand: Int32s  # [pieces, ITEM]
    num_columns: int  # of u
    # Elements, a power of two up to `WIDEST`: every block begins at a multiple of it, and is as wide.
    in_alignment: int
    out_alignment: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupWork:
    """The lists of one group: items `start .. start + count` of the step's."""

    shrink_start: int
    num_shrink_items: int
    expand_start: int
    num_expand_items: int
    num_columns: int
    in_alignment: int
    out_alignment: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """Everything that one step's launches need to know."""

    num_tokens: int
    order: Int32s  # [adapted tokens]
    items: Int32s  # [items, ITEM]
    groups: tuple[GroupWork, ...]
    tile_tokens: int
    is_split: bool

    @property
    def num_columns(self) -> int:
        """Columns of u in the group that needs most."""
        return max((group.num_columns for group in self.groups), default=0)

    @property
    def heads(self) -> Int32s:
        """[groups, 2, 4]: first item and number of items of each group's shrink and expand; 16 bytes per launch."""
        heads = np.zeros((len(self.groups), 2, 4), np.int32)
        for head, group in zip(heads, self.groups, strict=True):
            head[0, :2] = group.shrink_start, group.num_shrink_items
            head[1, :2] = group.expand_start, group.num_expand_items
        return heads


def plan_work(groups: Sequence[GroupTable], grouping: Grouping, blocking: Blocking) -> StepWork:
    """Cut a step into items. Layers whose slots have the same r and k share their lists."""
    is_split = blocking.splits(grouping.num_adapted)
    tile_tokens = blocking.tile_tokens(grouping.num_adapted, len(grouping.slots))
    phases = blocking.shrink_phase(grouping.num_adapted), blocking.expand_phase(grouping.num_adapted)
    tiles = [_tiles(begin, end, tile_tokens) for begin, end in pairwise(grouping.starts.tolist())]
    slots = grouping.slots.tolist()
    made: dict[tuple[object, ...], GroupWork] = {}
    lists: list[Int32s] = []
    works = []
    num_items = 0
    for group in groups:
        layouts = _layouts(group, slots)
        key = (group.kind, layouts)
        if key not in made:
            pieces = [pieces_of(group.kind, layout, blocking) for layout in layouts]
            shrink, expand = (_items([getattr(p, phase) for p in pieces], slots, tiles) for phase in phases)
            made[key] = _group_work(pieces, num_items, len(shrink), len(expand))
            lists += [shrink, expand]
            num_items += len(shrink) + len(expand)
        works.append(made[key])
    items = np.concatenate(lists) if lists else np.zeros((0, ITEM), np.int32)
    return StepWork(
        num_tokens=grouping.num_tokens,
        order=grouping.order,
        items=items,
        groups=tuple(works),
        tile_tokens=tile_tokens,
        is_split=is_split,
    )


@lru_cache(maxsize=1 << 14)
def pieces_of(kind: tuple[int, tuple[int, ...], int], layout: bytes, blocking: Blocking) -> Pieces:
    """The pieces of slot 0, if it has this layout."""
    in_features, outs, max_slots = kind
    parts = parts_of(layout)
    present = [(r, k) for entries, _ in parts for r, k in entries if r]
    split_shrink, shrink = [], []
    expand: list[tuple[int, ...]] = []
    narrow_expand: list[tuple[int, ...]] = []
    column = start = 0
    for m, ((entries, is_affine), out) in enumerate(zip(parts, outs, strict=True)):
        row, first_column = m * max_slots * ENTRIES, column
        for i, (r, k) in enumerate(entries):
            rows = range(0, r, blocking.rank_rows)
            shrink += [(row + i, 0, 0, n, p, column, 0, 0) for n in range(k) for p in rows]
            stretches = list(enumerate(range(0, in_features // max(k, 1), blocking.depth)))
            split_shrink += [
                (row + i, 0, 0, n, p, column, begin, plane)
                for n in range(k)
                for p in rows
                for plane, begin in stretches
            ]
            column += r * k
        borders = sorted(
            {j * out // k for r, k in ([*entries, (1, 1)] if is_affine else entries) if r for j in range(k + 1)}
        )
        for low, high in pairwise(borders):
            for items, columns in ((expand, blocking.columns), (narrow_expand, blocking.narrow_columns)):
                cuts = [*range(low, high, columns), high]
                items += [(row, 0, 0, begin, end, first_column, start, out) for begin, end in pairwise(cuts)]
        start += out
    return Pieces(
        split_shrink=np.array(split_shrink, np.int32).reshape(-1, ITEM),
        shrink=np.array(shrink, np.int32).reshape(-1, ITEM),
        expand=np.array(expand, np.int32).reshape(-1, ITEM),
        narrow_expand=np.array(narrow_expand, np.int32).reshape(-1, ITEM),
        num_columns=column,
        in_alignment=gcd(WIDEST, *(in_features // k for _, k in present)),
        out_alignment=gcd(
            WIDEST, *outs, *(out // k for (entries, _), out in zip(parts, outs, strict=True) for r, k in entries if r)
        ),
    )


def _tiles(begin: int, end: int, tile_tokens: int) -> Int32s:
    """A segment cut: (first position in order, number of tokens)."""
    firsts = range(begin, end, tile_tokens)
    return np.array([(first, min(tile_tokens, end - first)) for first in firsts], np.int32)


def _layouts(group: GroupTable, slots: Sequence[int]) -> tuple[bytes, ...]:
    if len(slots) < 2:
        return tuple(group.layouts[slot] for slot in slots)
    found: tuple[bytes, ...] = itemgetter(*slots)(group.layouts)  # once per layer and step: a tenth of a comprehension
    return found


def _items(pieces: Sequence[Int32s], slots: Sequence[int], tiles: Sequence[Int32s]) -> Int32s:
    """Each segment's pieces, for each of its tiles. Tiles that read the same weights are neighbours, so that all but
    the first find them in the cache."""
    repeats = np.repeat([len(t) for t in tiles], [len(p) for p in pieces])
    if not len(repeats):
        return np.zeros((0, ITEM), np.int32)
    items = np.repeat(np.concatenate(pieces), repeats, axis=0)
    items[:, 0] += np.repeat(np.array(slots) * ENTRIES, [len(p) * len(t) for p, t in zip(pieces, tiles, strict=True)])
    items[:, 1:3] = np.concatenate([np.tile(t, (len(p), 1)) for p, t in zip(pieces, tiles, strict=True)])
    return items


def _group_work(pieces: Sequence[Pieces], start: int, num_shrink: int, num_expand: int) -> GroupWork:
    return GroupWork(
        shrink_start=start,
        num_shrink_items=num_shrink,
        expand_start=start + num_shrink,
        num_expand_items=num_expand,
        num_columns=max((p.num_columns for p in pieces), default=0),
        in_alignment=gcd(WIDEST, *(p.in_alignment for p in pieces)),
        out_alignment=gcd(WIDEST, *(p.out_alignment for p in pieces)),
    )
