"""u = scale * x @ A for every (slot, token tile) of a step, written already exchanged. Knows no launch sizes."""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shrink_kernel(
    x,  # [tokens, in]
    arena,
    index,  # int64 [slots, ENTRIES, 4]
    scale,  # fp32 [slots, ENTRIES]
    order,  # int32 [adapted tokens]
    items,  # int32 [items, 3]
    u,  # fp32 [adapted tokens, u_stride]
    in_features,
    u_stride,
    ENTRIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr,  # every block is a multiple of 16 wide
):
    """One program: a token tile times some rank rows of one block. Programs beyond the item's own k and r leave."""
    i_item, i_tile, i_entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, first, count = tl.load(items + 3 * i_item), tl.load(items + 3 * i_item + 1), tl.load(items + 3 * i_item + 2)
    p_entry = index + (slot.to(tl.int64) * ENTRIES + i_entry) * 4
    rank, k = tl.load(p_entry + 2).to(tl.int32), tl.load(p_entry + 3).to(tl.int32)
    if rank == 0:
        return
    rank_tiles = tl.cdiv(rank, BLOCK_R)
    n = i_tile // rank_tiles
    if n >= k:
        return
    p_a = arena + tl.multiple_of(tl.load(p_entry), 16)
    width, strip = in_features // k, rank // k
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    t = tl.arange(0, BLOCK_M)
    m_t = t < count
    token = tl.load(order + first + t, mask=m_t, other=0).to(tl.int64)
    p = (i_tile % rank_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_p = p < rank
    b_u = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, width, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        if ALIGNED:
            i = tl.max_contiguous(tl.multiple_of(i, 16), 16)
        m_i = i < width
        p_x = x + token[:, None] * in_features + (n * width + i)[None, :]
        b_x = tl.load(p_x, mask=m_t[:, None] & m_i[None, :], other=0.0)
        p_w = p_a + p.to(tl.int64)[None, :] * in_features + (n * width + i)[:, None]
        b_a = tl.load(p_w, mask=m_p[None, :] & m_i[:, None], other=0.0)
        b_u = tl.dot(b_x, b_a, b_u, input_precision="ieee")
    # The second entry's columns follow the first's.
    p_first = index + slot.to(tl.int64) * ENTRIES * 4
    base = tl.load(p_first + 2) * tl.load(p_first + 3) * (i_entry > 0)
    column = base + (p // strip) * rank + n * strip + p % strip  # the block exchange
    b_u *= tl.load(scale + slot.to(tl.int64) * ENTRIES + i_entry)
    tl.store(u + (first + t).to(tl.int64)[:, None] * u_stride + column[None, :], b_u, mask=m_t[:, None] & m_p[None, :])
