"""The "triton" backend: one launch of shrink and one of expand per projection group, for all modules and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

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
from gralora_kernels.triton_ops.embedding import look_up
from gralora_kernels.triton_ops.memory import at_least, gpu_kind, num_processors, staged
from gralora_kernels.triton_ops.variant import ELEMENT_NAMES, VECTOR_BYTES, Variant
from gralora_kernels.work import ITEM, Blocking, Int32s

Constants = dict[str, Any]

# 16 rank rows are the least that tensor cores take, and most adapters have no more. A stretch of 1024 makes of k = 1 on
# 4,096 features the four programs that k = 4 has. Steps of prompts have programs enough without splitting.
BLOCKING = Blocking(
    small_tile=16, full_tile=32, rank_rows=16, columns=512, narrow_columns=256, narrow_tokens=32, depth=1024,
    split_tokens=512,
)  # fmt: skip
BLOCK_K_BYTES = 256  # of a row, a round of shrink's loop
BLOCK_N = 128  # columns a round of expand's loop


@dataclass(frozen=True, slots=True)
class Form:
    """How a kernel is compiled."""

    warps: int
    stages: int
    registers: int | None = None  # most of a thread; left alone, NVIDIA's assembler may choose fewer and spill


# By kernel and tokens of a tile. Those of one token were measured on an H100 by `python -m benchmarks.tiles`.
FORMS = {
    ("shrink", 1): Form(warps=2, stages=4),
    ("shrink", 16): Form(warps=2, stages=4),
    ("shrink", 32): Form(warps=4, stages=3),
    ("expand", 1): Form(warps=4, stages=3, registers=56),
    ("expand", 16): Form(warps=4, stages=3, registers=80),
    ("expand", 32): Form(warps=4, stages=3),
}
# fp32 has no tensor cores on NVIDIA's GPUs, and needs twice the registers.
FORMS_OF_FP32 = {
    ("shrink", 1): Form(warps=8, stages=3, registers=96),
    ("shrink", 16): Form(warps=8, stages=3, registers=128),
    ("shrink", 32): Form(warps=4, stages=3),
    ("expand", 1): Form(warps=4, stages=2, registers=64),
    ("expand", 16): Form(warps=4, stages=2, registers=128),
    ("expand", 32): Form(warps=8, stages=2),
}
MOST_REGISTERS = 255  # of a thread
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
        self._blocking = BLOCKING
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
        self, groups: Sequence[GroupTable], *, max_tokens: int, max_width: int, dtype: torch.dtype, tile_tokens: int
    ) -> TritonBackend:
        """An instance for decode steps of at most `max_tokens` single tokens, whose adapters have at most `max_width`
        columns of u in a module, in tiles of `tile_tokens`. `prepare` refuses all others with `ReplayError`. Launches
        do not depend on the step, so that a graph captured from them serves all that was not refused.
        """
        other = TritonBackend(self._device)
        other._blocking = replace(BLOCKING, split_tokens=max(max_tokens, BLOCKING.split_tokens))
        other._use(groups)
        align = VECTOR_BYTES // dtype.itemsize
        usual = {group.kind: sum(_usual_items(group, phase) for phase in CONSTANTS) for group in groups}
        guard = ReplayGuard(
            tokens=max_tokens,
            columns=max_width * max(len(group.modules) for group in groups),
            items=SPARE_ITEMS * max_tokens * sum(usual.values()),
            tile_tokens=tile_tokens,
            is_split=True,
            in_alignments=tuple(align if group.in_features % align == 0 else 1 for group in groups),
            out_alignments=tuple(
                align if all(table.out_features % align == 0 for table in group.modules) else 1 for group in groups
            ),
        )
        other._reserve(guard.tokens, guard.columns, guard.items, is_split=guard.is_split)
        other._words.zero_()  # before its first step there is nothing to do
        other._guard = guard
        return other

    def tile_tokens(self, grouping: Grouping) -> int:
        """Tokens of the tiles that a step's work is cut into."""
        return self._blocking.tile_tokens(grouping.num_adapted, len(grouping.slots))

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

    def look_up(
        self, y: Tensor, ids: Tensor, arena: Tensor, group: GroupTable, grouping: Grouping, *, factor: float
    ) -> None:
        """See `AdapterBackend`."""
        look_up(y, ids, arena, group, grouping, factor=factor)

    def shrink(self, x: Tensor, arena: Tensor, group: GroupTable) -> None:
        """The first half of `apply`: u from x alone, so that it may run beside what makes y."""
        launch = self._launch("shrink", group, arena.dtype, len(x))
        if launch.programs:
            shrink_kernel[(launch.programs,)](
                x, arena, group.index, self._words, self._items, self._u, launch.head_at, self._first_order,
                group.in_features // launch.align, self._u_stride, self._plane_stride, **launch.variant,
            )  # fmt: skip

    def expand(self, y: Tensor, arena: Tensor, group: GroupTable) -> None:
        """The second half of `apply`."""
        launch = self._launch("expand", group, arena.dtype, len(y))
        if launch.programs:
            expand_kernel[(launch.programs,)](
                y, arena, group.index, group.scale, group.affine, self._words, self._items, self._u, launch.head_at,
                self._first_order, group.out_features // launch.align, group.in_features, self._u_stride,
                self._plane_stride, **launch.variant,
            )  # fmt: skip

    def lists(self, group: GroupTable) -> tuple[Int32s, Int32s]:
        """The last step's items of a group's shrink and expand, read back from the device: for tests."""
        items = self._items.view(-1, ITEM).cpu().numpy()
        starts = [self._head_at(self._places[group], phase) for phase in PHASES]
        shrink, expand = (
            items[first : first + count] for first, count in (self._words[at : at + 2].tolist() for at in starts)
        )
        return shrink, expand

    def _use(self, groups: Sequence[GroupTable]) -> None:
        if self._groups != tuple(groups):
            assert self._guard is None, "a frozen backend serves the groups that it was made for"
            self._groups = tuple(groups)
            self._places = {group: place for place, group in enumerate(groups)}
            self._planner = ListPlanner(groups, self._blocking)
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

    def _launch(self, phase: str, group: GroupTable, dtype: torch.dtype, rows: int) -> _Launch:
        """The variant of the kernel, and how many programs. Called twice a group and step: it makes nothing anew."""
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
        programs = min(items, PROGRAMS_PER_PROCESSOR * num_processors(self._device))
        variant = variant_of(phase, tile_tokens, align, is_split, dtype)
        return _Launch(programs, self._head_at(place, phase), align, variant)

    @staticmethod
    def _head_at(place: int, phase: str) -> int:
        """Where in `_words` a list's head is."""
        return HEAD_WORDS * place + 4 * PHASES.index(phase)


class _Launch(NamedTuple):
    programs: int
    head_at: int
    align: int
    variant: Constants  # constants and compiler options


@lru_cache
def variant_of(phase: str, tile_tokens: int, align: int, is_split: bool, dtype: torch.dtype) -> Constants:
    constants = CONSTANTS[phase](tile_tokens, align, is_split, dtype)
    return constants | launch_options(phase, gpu_kind(), dtype, tile_tokens, align)


def shrink_constants(tile_tokens: int, align: int, is_split: bool, dtype: torch.dtype) -> Constants:
    sizes = {"BLOCK_M": tile_tokens, "BLOCK_R": BLOCKING.rank_rows, "DEPTH": BLOCKING.depth}
    return sizes | {"BLOCK_K": BLOCK_K_BYTES // dtype.itemsize, "ALIGN": align, "SPLIT": is_split}


def expand_constants(tile_tokens: int, align: int, is_split: bool, _: torch.dtype) -> Constants:
    sizes = {"BLOCK_M": tile_tokens, "BLOCK_N": BLOCK_N, "BLOCK_R": BLOCKING.rank_rows}
    return sizes | {"DEPTH": BLOCKING.depth, "ALIGN": align, "ENTRIES": ENTRIES, "SPLIT": is_split}


PHASES = ("shrink", "expand")
CONSTANTS = {"shrink": shrink_constants, "expand": expand_constants}


def launch_options(kernel: str, gpu_kind: str, dtype: torch.dtype, tile_tokens: int, align: int) -> dict[str, Any]:
    """Compiler options. On AMD, whose warps are twice as wide, the instruction's shape would follow the tile's, and
    with it the order of sums."""
    form = (FORMS_OF_FP32 if dtype == torch.float32 else FORMS)[kernel, tile_tokens]
    if gpu_kind == "hip":
        return {"num_warps": min(form.warps, 4), "num_stages": form.stages, "matrix_instr_nonkdim": 16}
    if align == 1:  # an address for each element takes registers
        warps = 8 if tile_tokens == BLOCKING.full_tile else form.warps
        return {"num_warps": warps, "num_stages": 2, "maxnreg": MOST_REGISTERS}
    options = {"num_warps": form.warps, "num_stages": form.stages}
    return options if form.registers is None else options | {"maxnreg": form.registers}


def variants(dtype: torch.dtype) -> list[Variant]:
    """Every form that the backend may launch."""
    element = f"*{ELEMENT_NAMES[dtype]}"
    pointers = dict.fromkeys(("x", "y", "arena"), element)
    pointers |= dict.fromkeys(("words", "items"), "*i32") | {
        "index": "*i64",
        "affine": "*i64",
        "scale": "*fp32",
        "u": "*fp32",
    }
    kernels = (("shrink", shrink_kernel, "b_a", "b_x"), ("expand", expand_kernel, "b_b", "b_old"))
    forms = [(1, True), (BLOCKING.small_tile, True), (BLOCKING.full_tile, False)]
    return [
        Variant(
            name=f"{name}, {tile} tokens{', split' if is_split else ''}, align {align}",
            function=function,
            dtype=dtype,
            constants=CONSTANTS[name](tile, align, is_split, dtype),
            pointers=pointers,
            options={kind: launch_options(name, kind, dtype, tile, align) for kind in ("cuda", "hip")},
            # One token's own elements are fewer than threads.
            wide_loads=() if align == 1 else (weights,) if tile == 1 else (weights, own),
            is_product=True,
            family="adapters",
        )
        for name, function, weights, own in kernels
        for tile, is_split in forms
        for align in (VECTOR_BYTES // dtype.itemsize, 1)
    ]


def _usual_items(group: GroupTable, phase: str) -> int:
    """Of one token in such a group, if its adapter is none of the largest. More are served too, in turns."""
    if phase == "shrink":
        return len(group.modules) * 2 * max(4, BLOCKING.num_planes(group.in_features))
    return sum(-(-table.out_features // BLOCKING.narrow_columns) for table in group.modules)


def _check(tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"the triton backend needs contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )
