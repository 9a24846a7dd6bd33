"""u = x @ A for every item of a list, written already exchanged. Knows no launch sizes."""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["head_at", "order_at", "in_units", "u_stride", "plane_stride"])
def shrink_kernel(
    x,  # [tokens, in]
    arena,
    index,  # int64 [modules, slots, ENTRIES, 4]
    words,  # int32: heads (first item of a list, number of items), order [adapted tokens]
    items,  # int32 [items of the step, 8]
    u,  # fp32 [planes, adapted tokens, u_stride]
    head_at,  # of this list
    order_at,
    in_units,  # in_features / ALIGN: a size that is multiplied by ALIGN is known to be a multiple of it
    u_stride,
    plane_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPTH: tl.constexpr,  # elements of a stretch, a multiple of BLOCK_K
    ALIGN: tl.constexpr,  # elements: every block begins at a multiple of it
    SPLIT: tl.constexpr,  # an item is one stretch, else all of its block
):
    """An item: a token tile times some rank rows of one block of one entry. Programs take turns."""
    head, order = words + head_at, words + order_at
    first_item = tl.load(head)
    in_features = in_units * ALIGN
    # A replayed graph has as many programs as it was captured with, and the step as many items as it has.
    for number in range(tl.program_id(0), tl.load(head + 1), tl.num_programs(0)):
        item = items + (first_item + number).to(tl.int64) * 8
        row, first, count = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
        n, p_first, column, plane = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5), tl.load(item + 7)
        begin = tl.multiple_of(tl.load(item + 6), ALIGN)
        entry = index + row * 4
        rank, k = tl.load(entry + 2).to(tl.int32), tl.load(entry + 3).to(tl.int32)
        width = tl.multiple_of(in_features // k, ALIGN)
        end = tl.minimum(begin + DEPTH, width) if SPLIT else width
        t = tl.arange(0, BLOCK_M)
        m_t = t < count
        token = tl.load(order + first + t, mask=m_t, other=0).to(tl.int64)
        p = p_first + tl.arange(0, BLOCK_R)
        m_p = p < rank
        p_x = x + token * in_features + n * width
        p_a = arena + tl.multiple_of(tl.load(entry), 16) + n * width + p.to(tl.int64) * in_features
        b_u = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for stretch in range(begin, end, DEPTH):
            b_s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for start in range(stretch, tl.minimum(stretch + DEPTH, width), BLOCK_K):
                i = start + tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_K), ALIGN), ALIGN)
                m_i = i < width
                b_x = tl.load(p_x[:, None] + i[None, :], mask=m_t[:, None] & m_i[None, :], other=0.0)
                b_a = tl.load(p_a[None, :] + i[:, None], mask=m_p[None, :] & m_i[:, None], other=0.0)
                b_s = tl.dot(b_x, b_a, b_s, input_precision="ieee")
            b_u += b_s
        strip = rank // k
        exchanged = column + (p // strip) * rank + n * strip + p % strip  # the block exchange
        p_u = u + plane.to(tl.int64) * plane_stride + (first + t).to(tl.int64)[:, None] * u_stride + exchanged[None, :]
        tl.store(p_u, b_u, mask=m_t[:, None] & m_p[None, :])
