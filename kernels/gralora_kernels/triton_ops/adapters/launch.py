"""The "triton" backend: one launch of shrink and one of expand per projection group, for all modules and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from gralora_kernels.grouping import Grouping
from gralora_kernels.packing import ROW_MAJOR
from gralora_kernels.replay import ReplayGuard
from gralora_kernels.tables import ENTRIES, GroupTable
from gralora_kernels.triton_ops.adapters.expand import expand_kernel
from gralora_kernels.triton_ops.adapters.shrink import shrink_kernel
from gralora_kernels.triton_ops.variant import ELEMENT_NAMES, VECTOR_BYTES, Variant
from gralora_kernels.work import ITEM, Blocking, GroupWork, StepWork, plan_work

Constants = dict[str, int]

BLOCK_K = 128
# Expand's loop is over ranks, mostly one round: a third stage would only cost registers (in fp32 it spilled).
NUM_STAGES = {"shrink": 3, "expand": 2}
# 16 rank rows are the least that tensor cores take, and most adapters have no more.
BLOCKING = Blocking(small_tile=16, full_tile=32, rank_rows=16, columns=128)
U_BYTES = 4  # per element of the intermediate, at most


class TritonBackend:
    """One device. Holds the intermediate u and the work lists: calls belong on one stream.

    For a CUDA graph: an instance of its own, `prepare` with the largest step that the graph shall serve, `freeze`,
    capture the forward pass; then, for each step, `prepare` and replay.
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
        self._launches: dict[GroupTable, tuple[GroupWork, Tensor, Tensor]] = {}  # and the heads of shrink and expand
        self._work: StepWork | None = None
        self._u_stride = 0
        self._u = torch.empty(0, dtype=torch.uint8, device=device)
        self._words = torch.empty(0, dtype=torch.int32, device=device)  # order, heads, items

    def prepare(self, groups: Sequence[GroupTable], grouping: Grouping) -> None:
        """Make the step's work lists and send them over, without waiting for the device."""
        work = plan_work(groups, grouping, BLOCKING)
        if self._guard is None:
            self._size(groups, work)
        else:
            self._guard.check(work)
        self._upload(work)

    def freeze(self) -> None:
        """From now on memory and launches stay as the last `prepare` made them; a step that needs more is refused."""
        assert self._work is not None, "nothing was prepared"
        self._guard = ReplayGuard(self._work)

    def apply(self, y: Tensor, x: Tensor, arena: Tensor, group: GroupTable, grouping: Grouping) -> None:
        """y [tokens, sum(out)] += adapter(x [tokens, in]) for the tokens that have an adapter."""
        assert self._work is not None, "apply before prepare"
        work, shrink_head, expand_head = self._launches[group]
        if not work.num_shrink_items:
            return
        _check(y, (grouping.num_tokens, group.out_features), arena.dtype)
        _check(x, (grouping.num_tokens, group.in_features), arena.dtype)
        order, items, u = self._words, self._items, self._u.view(arena.dtype)
        shrink, expand = constants_for(work, self._work.tile_tokens, arena.dtype)
        shrink_kernel[(work.num_shrink_items,)](
            x, arena, group.index, group.scale, order, items, shrink_head, u, group.in_features // shrink["ALIGN"],
            self._u_stride, **shrink, **launch_options("shrink", _gpu_kind()),
        )  # fmt: skip
        expand_kernel[(work.num_expand_items,)](
            y, arena, group.index, order, items, expand_head, u, group.out_features // expand["ALIGN"],
            self._u_stride, **expand, **launch_options("expand", _gpu_kind()),
        )  # fmt: skip

    def _size(self, groups: Sequence[GroupTable], work: StepWork) -> None:
        """Memory for this step, and where in it each launch finds its list."""
        num_order = -(-len(work.order) // ITEM) * ITEM  # keeps heads and items aligned
        first_item = num_order + len(groups) * 8
        needed = first_item + work.items.size
        if self._words.numel() < needed:
            self._words = torch.empty(2 * needed, dtype=torch.int32, device=self._device)
        heads = self._words[num_order:first_item].view(len(groups), 2, 4).unbind()
        self._items = self._words[first_item:]
        self._first_head, self._first_item = num_order, first_item
        self._u_stride = work.num_columns
        num_bytes = len(work.order) * self._u_stride * U_BYTES
        if self._u.numel() < num_bytes:
            self._u = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._launches = {
            group: (part, head[0], head[1]) for group, part, head in zip(groups, work.groups, heads, strict=True)
        }
        self._work = work

    def _upload(self, work: StepWork) -> None:
        """One copy. Fresh pinned memory each time: torch keeps it until the copy is done, so nobody has to wait."""
        pinned = self._device.type == "cuda"
        words = torch.empty(self._first_item + work.items.size, dtype=torch.int32, pin_memory=pinned)
        host = words.numpy()
        host[: len(work.order)] = work.order
        host[self._first_head : self._first_item] = work.heads.reshape(-1)
        host[self._first_item :] = work.items.reshape(-1)
        self._words[: len(words)].copy_(words, non_blocking=True)


def constants_for(work: GroupWork, tile_tokens: int, dtype: torch.dtype) -> tuple[Constants, Constants]:
    """The variant of each kernel that this work gets: loads of 16 bytes if all widths allow it, else of one element."""
    vector = VECTOR_BYTES // dtype.itemsize
    align_in, align_out = (vector if d % vector == 0 else 1 for d in (work.in_alignment, work.out_alignment))
    return shrink_constants(tile_tokens, align_in), expand_constants(tile_tokens, align_out)


def shrink_constants(tile_tokens: int, align: int) -> Constants:
    return {"BLOCK_M": tile_tokens, "BLOCK_R": BLOCKING.rank_rows, "BLOCK_K": BLOCK_K, "ALIGN": align}


def expand_constants(tile_tokens: int, align: int) -> Constants:
    sizes = {"BLOCK_M": tile_tokens, "BLOCK_N": BLOCKING.columns, "BLOCK_R": BLOCKING.rank_rows}
    return sizes | {"ALIGN": align, "ENTRIES": ENTRIES}


def launch_options(kernel: str, gpu_kind: str) -> dict[str, Any]:
    """Compiler options. On AMD the instruction's shape would follow the tile's, and with it the order of sums."""
    common = {"num_warps": 4, "num_stages": NUM_STAGES[kernel]}
    return common | {"matrix_instr_nonkdim": 16} if gpu_kind == "hip" else common


def variants(dtype: torch.dtype) -> list[Variant]:
    """Every form that the backend may launch."""
    element = f"*{ELEMENT_NAMES[dtype]}"
    pointers = dict.fromkeys(("x", "y", "arena", "u"), element)
    pointers |= {"index": "*i64", "scale": "*fp32", "order": "*i32", "items": "*i32", "head": "*i32"}
    kernels = (
        ("shrink", shrink_kernel, shrink_constants, ("b_x", "b_a")),
        ("expand", expand_kernel, expand_constants, ("b_b", "b_old")),
    )
    return [
        Variant(
            name=f"{name}, {tile} tokens, align {align}",
            function=function,
            dtype=dtype,
            constants=make(tile, align),
            pointers=pointers,
            options={kind: launch_options(name, kind) for kind in ("cuda", "hip")},
            wide_loads=wide if align > 1 else (),
            is_product=True,
            family="adapters",
        )
        for name, function, make, wide in kernels
        for tile in (BLOCKING.small_tile, BLOCKING.full_tile)
        for align in (VECTOR_BYTES // dtype.itemsize, 1)
    ]


def _gpu_kind() -> str:
    return "hip" if torch.version.hip else "cuda"


def _check(tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"the triton backend needs contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )
