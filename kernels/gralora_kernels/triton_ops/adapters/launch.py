"""The "triton" backend: one launch of shrink and one of expand per projection group, for all modules and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from gralora_kernels.grouping import Grouping
from gralora_kernels.listing import Listing, ListPlanner
from gralora_kernels.packing import ROW_MAJOR
from gralora_kernels.replay import ReplayGuard
from gralora_kernels.tables import ENTRIES, GroupTable
from gralora_kernels.triton_ops.adapters.expand import expand_kernel
from gralora_kernels.triton_ops.adapters.lists import list_kernel
from gralora_kernels.triton_ops.adapters.shrink import shrink_kernel
from gralora_kernels.triton_ops.memory import at_least, gpu_kind, num_processors, staged
from gralora_kernels.triton_ops.variant import ELEMENT_NAMES, VECTOR_BYTES, Variant
from gralora_kernels.work import ITEM, Blocking, Int32s

Constants = dict[str, Any]

BLOCK_K_BYTES = 256  # of a row, a round of shrink's loop
# Expand's loop is over ranks, mostly one round: a third stage would only cost registers (in fp32 it spilled).
NUM_STAGES = {"shrink": 3, "expand": 2}
# 16 rank rows are the least that tensor cores take, and most adapters have no more. A stretch of 1024 makes of k = 1 on
# 4,096 features the four programs that k = 4 has. Steps of prompts have programs enough without splitting.
BLOCKING = Blocking(small_tile=16, full_tile=32, rank_rows=16, columns=128, depth=1024, split_tokens=512)
# NVIDIA's assembler would rather spill 8 bytes than take more than 56 or 80 registers.
FP32: dict[tuple[str, int], dict[str, int]] = {
    ("shrink", 16): {"num_warps": 8, "maxnreg": 128},
    ("expand", 16): {"maxnreg": 128},
}
LIST_BLOCK = 128
PROGRAMS_PER_PROCESSOR = 16  # of 4 warps each: no GPU holds more at once
SPARE_ITEMS = 16  # times as many as usual: for larger adapters, and layers that differ
HEAD_WORDS = 8  # of a group: shrink's and expand's, 16 bytes each


class TritonBackend:
    """One device. Holds the intermediate u and the work lists: calls belong on one stream, or on streams that wait for
    each other.

    For CUDA graphs there is `frozen`: an instance whose memory and launches never change.
    """

    name = "triton"
    packing = ROW_MAJOR

    def __init__(self, device: torch.device) -> None:
        if device.type == "cpu" and not triton.knobs.runtime.interpret:
            raise ValueError("backend 'triton' cannot serve the CPU, except under Triton's interpreter")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("backend 'triton' was asked for, but torch sees no GPU")
        self._device = device
        self._guard: ReplayGuard | None = None
        self._planner: ListPlanner | None = None
        self._groups: tuple[GroupTable, ...] = ()
        self._places: dict[GroupTable, int] = {}
        self._step: Listing | None = None
        self._u_stride = self._plane_stride = self._first_order = self._first_segment = self._first_part = 0
        self._u = torch.empty(0, dtype=torch.float32, device=device)
        self._words = torch.empty(0, dtype=torch.int32, device=device)  # heads, order, segments, parts
        self._items = torch.empty(0, dtype=torch.int32, device=device)
        self._pieces = torch.empty(0, dtype=torch.int32, device=device)
        self._num_pieces = self._forgotten = 0

    def frozen(
        self, groups: Sequence[GroupTable], *, max_tokens: int, max_width: int, dtype: torch.dtype
    ) -> TritonBackend:
        """An instance for decode steps of at most `max_tokens` single tokens, whose adapters have at most `max_width`
        columns of u in a module. `prepare` refuses all others with `ReplayError`. Launches do not depend on the step,
        so that a graph captured from them serves all that was not refused.
        """
        other = TritonBackend(self._device)
        other._use(groups)
        align = VECTOR_BYTES // dtype.itemsize
        usual = {group.kind: sum(_usual_items(group, phase) for phase in CONSTANTS) for group in groups}
        guard = ReplayGuard(
            tokens=max_tokens,
            columns=max_width * max(len(group.modules) for group in groups),
            items=SPARE_ITEMS * max_tokens * sum(usual.values()),
            tile_tokens=BLOCKING.small_tile,
            is_split=True,
            in_alignments=tuple(align if group.in_features % align == 0 else 1 for group in groups),
            out_alignments=tuple(
                align if all(table.out_features % align == 0 for table in group.modules) else 1 for group in groups
            ),
        )
        other._reserve(guard.tokens, guard.columns, guard.items, is_split=guard.is_split)
        other._guard = guard
        return other

    def prepare(self, groups: Sequence[GroupTable], grouping: Grouping) -> None:
        """Make the step's work lists on the device, without waiting for it."""
        self._use(groups)
        assert self._planner is not None
        step = self._planner.plan(grouping)
        if self._guard is None:
            self._reserve(len(step.order), step.num_columns, step.num_items, is_split=step.is_split)
        else:
            self._guard.check(step)
        self._step = step
        self._send_pieces(self._planner)
        self._make_lists(step)

    def apply(self, y: Tensor, x: Tensor, arena: Tensor, group: GroupTable, grouping: Grouping) -> None:
        """y [tokens, sum(out)] += adapter(x [tokens, in]) for the tokens that have an adapter."""
        _check(y, (grouping.num_tokens, group.out_features), arena.dtype)
        _check(x, (grouping.num_tokens, group.in_features), arena.dtype)
        self.shrink(x, arena, group)
        self.expand(y, arena, group)

    def shrink(self, x: Tensor, arena: Tensor, group: GroupTable) -> None:
        """The first half of `apply`: u from x alone, so that it may run beside what makes y."""
        place, constants, programs = self._launch("shrink", group, arena.dtype, len(x))
        if programs:
            shrink_kernel[(programs,)](
                x, arena, group.index, self._order, self._items, self._head(place, "shrink"), self._u,
                group.in_features // constants["ALIGN"], self._u_stride, self._plane_stride,
                **constants, **launch_options("shrink", gpu_kind(), arena.dtype, constants["BLOCK_M"]),
            )  # fmt: skip

    def expand(self, y: Tensor, arena: Tensor, group: GroupTable) -> None:
        """The second half of `apply`."""
        place, constants, programs = self._launch("expand", group, arena.dtype, len(y))
        if programs:
            expand_kernel[(programs,)](
                y, arena, group.index, group.scale, self._order, self._items, self._head(place, "expand"), self._u,
                group.out_features // constants["ALIGN"], group.in_features, self._u_stride, self._plane_stride,
                **constants, **launch_options("expand", gpu_kind(), arena.dtype, constants["BLOCK_M"]),
            )  # fmt: skip

    def lists(self, group: GroupTable) -> tuple[Int32s, Int32s]:
        """The last step's items of a group's shrink and expand, read back from the device: for tests."""
        items = self._items.view(-1, ITEM).cpu().numpy()
        heads = [self._head(self._places[group], phase)[:2].tolist() for phase in PHASES]
        shrink, expand = (items[first : first + count] for first, count in heads)
        return shrink, expand

    def _use(self, groups: Sequence[GroupTable]) -> None:
        if self._groups != tuple(groups):
            assert self._guard is None, "a frozen backend serves the groups that it was made for"
            self._groups = tuple(groups)
            self._places = {group: place for place, group in enumerate(groups)}
            self._planner = ListPlanner(groups, BLOCKING)
            self._num_pieces = 0

    def _reserve(self, num_adapted: int, num_columns: int, num_items: int, *, is_split: bool) -> None:
        """Memory for a step of so many adapted tokens. What is there stays if it is enough."""
        planes = BLOCKING.num_planes(max((g.in_features for g in self._groups), default=0)) if is_split else 1
        self._u_stride = -(-num_columns // ITEM) * ITEM
        self._plane_stride = num_adapted * self._u_stride
        self._u = at_least(self._u, planes * self._plane_stride)
        self._items = at_least(self._items, num_items * ITEM)
        self._first_order = HEAD_WORDS * len(self._groups)
        self._first_segment = self._first_order + -(-num_adapted // 4) * 4
        self._first_part = self._first_segment + 4 * num_adapted
        # At worst each token is a segment, and each group is of a class of its own.
        self._words = at_least(self._words, self._first_part + 2 * len(self._groups) * 4 * num_adapted)

    def _send_pieces(self, planner: ListPlanner) -> None:
        """What was seen for the first time."""
        if self._forgotten != planner.forgotten:
            self._forgotten, self._num_pieces = planner.forgotten, 0
        pieces, sent = planner.pieces, self._num_pieces
        if len(pieces) * ITEM > self._pieces.numel():
            self._pieces, sent = torch.empty(2 * pieces.size, dtype=torch.int32, device=self._device), 0
        if sent < len(pieces):
            new = pieces[sent:].reshape(-1)
            self._pieces[sent * ITEM : pieces.size].copy_(
                staged(torch.from_numpy(new), self._device), non_blocking=True
            )
            self._num_pieces = len(pieces)

    def _make_lists(self, step: Listing) -> None:
        """One copy, one launch."""
        words: Int32s = np.zeros(self._first_part + step.parts.size, np.int32)
        for first, values in (
            (0, step.heads),
            (self._first_order, step.order),
            (self._first_segment, step.segments),
            (self._first_part, step.parts),
        ):
            words[first:][: values.size] = values.reshape(-1)
        self._words[: len(words)].copy_(staged(torch.from_numpy(words), self._device), non_blocking=True)
        if step.num_items:
            list_kernel[(len(step.segments), len(step.parts))](
                self._items, self._pieces, self._words[self._first_segment :], self._words[self._first_part :],
                step.tile_tokens, ENTRIES=ENTRIES, BLOCK=LIST_BLOCK,
            )  # fmt: skip

    def _launch(self, phase: str, group: GroupTable, dtype: torch.dtype, rows: int) -> tuple[int, Constants, int]:
        """The group's place, the variant of the kernel, and how many programs."""
        place, vector = self._places[group], VECTOR_BYTES // dtype.itemsize
        if self._guard is not None:
            guard = self._guard
            alignments = guard.in_alignments if phase == "shrink" else guard.out_alignments
            tile_tokens, is_split, alignment = guard.tile_tokens, guard.is_split, alignments[place]
            items = rows * _usual_items(group, phase)
        else:
            assert self._step is not None, "apply before prepare"
            step = self._step
            found = (step.in_alignments if phase == "shrink" else step.out_alignments)[place]
            tile_tokens, is_split, alignment = step.tile_tokens, step.is_split, int(found)
            items = int(step.heads[place, PHASES.index(phase), 1])
        align = vector if alignment % vector == 0 else 1
        constants = CONSTANTS[phase](tile_tokens, align, is_split, dtype)
        return place, constants, min(items, PROGRAMS_PER_PROCESSOR * num_processors(self._device))

    def _head(self, place: int, phase: str) -> Tensor:
        return self._words[HEAD_WORDS * place + 4 * PHASES.index(phase) :]

    @property
    def _order(self) -> Tensor:
        return self._words[self._first_order :]


def shrink_constants(tile_tokens: int, align: int, is_split: bool, dtype: torch.dtype) -> Constants:
    block_k = BLOCK_K_BYTES // dtype.itemsize
    sizes = {"BLOCK_M": tile_tokens, "BLOCK_R": BLOCKING.rank_rows, "BLOCK_K": block_k, "DEPTH": BLOCKING.depth}
    return sizes | {"ALIGN": align, "SPLIT": is_split}


def expand_constants(tile_tokens: int, align: int, is_split: bool, _: torch.dtype) -> Constants:
    sizes = {"BLOCK_M": tile_tokens, "BLOCK_N": BLOCKING.columns, "BLOCK_R": BLOCKING.rank_rows}
    return sizes | {"DEPTH": BLOCKING.depth, "ALIGN": align, "ENTRIES": ENTRIES, "SPLIT": is_split}


PHASES = ("shrink", "expand")
CONSTANTS = {"shrink": shrink_constants, "expand": expand_constants}


def launch_options(kernel: str, gpu_kind: str, dtype: torch.dtype, tile_tokens: int) -> dict[str, Any]:
    """Compiler options. On AMD the instruction's shape would follow the tile's, and with it the order of sums."""
    options: dict[str, Any] = {"num_warps": 4, "num_stages": NUM_STAGES[kernel]}
    if gpu_kind == "hip":
        return options | {"matrix_instr_nonkdim": 16}
    if dtype == torch.float32:
        options |= FP32.get((kernel, tile_tokens), {})
    return options


def variants(dtype: torch.dtype) -> list[Variant]:
    """Every form that the backend may launch."""
    element = f"*{ELEMENT_NAMES[dtype]}"
    pointers = dict.fromkeys(("x", "y", "arena"), element)
    pointers |= dict.fromkeys(("order", "items", "head"), "*i32") | {"index": "*i64", "scale": "*fp32", "u": "*fp32"}
    kernels = (("shrink", shrink_kernel, ("b_x", "b_a")), ("expand", expand_kernel, ("b_b", "b_old")))
    # Only steps of small tiles are split.
    forms = [(BLOCKING.small_tile, True), (BLOCKING.small_tile, False), (BLOCKING.full_tile, False)]
    return [
        Variant(
            name=f"{name}, {tile} tokens{', split' if is_split else ''}, align {align}",
            function=function,
            dtype=dtype,
            constants=CONSTANTS[name](tile, align, is_split, dtype),
            pointers=pointers,
            options={kind: launch_options(name, kind, dtype, tile) for kind in ("cuda", "hip")},
            wide_loads=wide if align > 1 else (),
            is_product=True,
            family="adapters",
        )
        for name, function, wide in kernels
        for tile, is_split in forms
        for align in (VECTOR_BYTES // dtype.itemsize, 1)
    ]


def _usual_items(group: GroupTable, phase: str) -> int:
    """Of one token in such a group, if its adapter is none of the largest. More are served too, in turns."""
    if phase == "shrink":
        return len(group.modules) * 2 * max(4, BLOCKING.num_planes(group.in_features))
    return sum(-(-table.out_features // BLOCKING.columns) for table in group.modules)


def _check(tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"the triton backend needs contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )
