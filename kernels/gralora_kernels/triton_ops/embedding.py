"""What adapters make of rows of an embedding. Knows no step: rare, and little beside a layer."""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gralora_kernels.alignment import map_numel
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import ENTRIES, GroupTable
from gralora_kernels.triton_ops.memory import staged
from gralora_kernels.triton_ops.variant import ELEMENT_NAMES, Variant

BLOCK_R = 16
BLOCK_N = 256
OPTIONS = {"num_warps": 4}


@triton.jit(do_not_specialize=["in_features", "out_features", "rows_at"])
def look_up_kernel(
    y,  # [tokens, out]
    ids,  # int32 or int64 [tokens]
    order,  # int32 [adapted]: tokens
    slots,  # int32 [adapted]: of each of them
    arena,
    index,  # int64 [slots, ENTRIES, 4]
    scale,  # fp32 [slots, ENTRIES]
    maps,  # int64 [slots]: 1 + where the slot's map lies, 0: it has none
    factor,
    in_features,
    out_features,
    rows_at,  # behind the start of a map
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """One program: some columns of one token."""
    i = tl.program_id(0)
    token, slot = tl.load(order + i).to(tl.int64), tl.load(slots + i).to(tl.int64)
    id_ = tl.load(ids + token).to(tl.int64)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_o = o < out_features
    p_y = y + token * out_features + o
    b_y = tl.load(p_y, mask=m_o, other=0.0).to(tl.float32)
    at = tl.load(maps + slot)
    if at > 0:
        p_map = arena + (at - 1)
        row = tl.load(p_map.to(tl.pointer_type(tl.int32), bitcast=True) + id_).to(tl.int64)
        if row > 0:
            p_row = p_map + rows_at + (row - 1) * out_features + o
            b_y = tl.load(p_row, mask=m_o, other=0.0).to(tl.float32) * factor
    for i_entry in tl.static_range(ENTRIES):
        p_entry = index + (slot * ENTRIES + i_entry) * 4
        rank = tl.load(p_entry + 2).to(tl.int32)
        p_a, p_b = arena + tl.load(p_entry) + id_, arena + tl.load(p_entry + 1)
        b_sum = tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, rank, BLOCK_R):
            c = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
            m_c = c < rank
            b_u = tl.load(p_a + c * in_features, mask=m_c, other=0.0).to(tl.float32)
            b_b = tl.load(p_b + c[:, None] * out_features + o[None, :], mask=m_c[:, None] & m_o[None, :], other=0.0)
            b_sum += tl.sum(b_u[:, None] * b_b.to(tl.float32), 0)
        b_y += b_sum * (tl.load(scale + slot * ENTRIES + i_entry) * factor)
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_o)


def look_up(y: Tensor, ids: Tensor, arena: Tensor, group: GroupTable, grouping: Grouping, *, factor: float) -> None:
    """As `AdapterBackend.look_up`."""
    (module,) = group.modules
    assert y.shape == (grouping.num_tokens, module.out_features), (y.shape, grouping.num_tokens, module.out_features)
    assert y.is_contiguous(), y.stride()
    assert y.dtype == arena.dtype, (y.dtype, arena.dtype)
    lengths = grouping.starts[1:] - grouping.starts[:-1]
    words = torch.from_numpy(np.concatenate([grouping.order, np.repeat(grouping.slots, lengths)]))
    order, slots = staged(words, y.device).to(y.device, non_blocking=True).view(2, -1)
    look_up_kernel[(grouping.num_adapted, triton.cdiv(module.out_features, BLOCK_N))](
        y, ids, order, slots, arena, module.index, module.scale, module.affine, factor, module.in_features,
        module.out_features, map_numel(module.in_features, arena.itemsize), BLOCK_R=BLOCK_R, BLOCK_N=BLOCK_N,
        ENTRIES=ENTRIES, **OPTIONS,
    )  # fmt: skip


def variants(dtype: torch.dtype) -> list[Variant]:
    """One."""
    pointers = dict.fromkeys(("y", "arena"), f"*{ELEMENT_NAMES[dtype]}") | {"scale": "*fp32"}
    pointers |= dict.fromkeys(("ids", "order", "slots"), "*i32") | dict.fromkeys(("index", "maps"), "*i64")
    return [
        Variant(
            name="look up",
            function=look_up_kernel,
            dtype=dtype,
            constants={"BLOCK_R": BLOCK_R, "BLOCK_N": BLOCK_N, "ENTRIES": ENTRIES},
            pointers=pointers,
            floats=("factor",),
            options=dict.fromkeys(("cuda", "hip"), OPTIONS),
        )
    ]
