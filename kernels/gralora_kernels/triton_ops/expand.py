"""y += u @ B for every (slot, token tile) of a step. Knows no launch sizes."""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expand_kernel(
    y,  # [tokens, out]
    arena,
    index,  # int64 [slots, ENTRIES, 4]
    order,  # int32 [adapted tokens]
    items,  # int32 [items, 3]
    u,  # fp32 [adapted tokens, u_stride]
    out_features,
    u_stride,
    ENTRIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALIGNED: tl.constexpr,  # every block is a multiple of 16 wide
):
    """One program: a token tile times some output columns, all entries of its slot, so that y has one writer."""
    i_item, i_n = tl.program_id(0), tl.program_id(1)
    slot, first, count = tl.load(items + 3 * i_item), tl.load(items + 3 * i_item + 1), tl.load(items + 3 * i_item + 2)
    t = tl.arange(0, BLOCK_M)
    m_t = t < count
    begin = i_n * BLOCK_N
    end = tl.minimum(begin + BLOCK_N, out_features)
    o = begin + tl.arange(0, BLOCK_N)
    b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    p_u = u + (first + t).to(tl.int64)[:, None] * u_stride
    column = 0
    used = 0
    for i_entry in tl.static_range(ENTRIES):
        p_entry = index + (slot.to(tl.int64) * ENTRIES + i_entry) * 4
        rank, k = tl.load(p_entry + 2).to(tl.int32), tl.load(p_entry + 3).to(tl.int32)
        if rank > 0:
            p_b = arena + tl.multiple_of(tl.load(p_entry + 1), 16)
            width = out_features // k
            if ALIGNED:
                width = tl.multiple_of(width, 16)
            # One block, unless the tile straddles blocks: then each in turn, the others' columns masked.
            for j in range(begin // width, (end - 1) // width + 1):
                m_o = (o >= j * width) & (o < (j + 1) * width) & (o < out_features)
                for start in range(0, rank, BLOCK_R):
                    c = start + tl.arange(0, BLOCK_R)
                    m_c = c < rank
                    p_v = p_u + (column + j * rank + c)[None, :]
                    b_u = tl.load(p_v, mask=m_t[:, None] & m_c[None, :], other=0.0)
                    p_w = p_b + c.to(tl.int64)[:, None] * out_features + o[None, :]
                    b_b = tl.load(p_w, mask=m_c[:, None] & m_o[None, :], other=0.0)
                    b_y = tl.dot(b_u.to(b_b.dtype), b_b, b_y, input_precision="ieee")
            column += rank * k
            used += rank
    if used == 0:
        return
    token = tl.load(order + first + t, mask=m_t, other=0).to(tl.int64)
    p_y = y + token[:, None] * out_features + o[None, :]
    mask = m_t[:, None] & (o < out_features)[None, :]
    tl.store(p_y, (tl.load(p_y, mask=mask, other=0.0).to(tl.float32) + b_y).to(y.dtype.element_ty), mask=mask)
