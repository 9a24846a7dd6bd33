"""y += scale * u @ B for every item of a list. Knows no launch sizes."""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["y_units", "in_features", "u_stride", "plane_stride"])
def expand_kernel(
    y,  # [tokens, y_stride]
    arena,
    index,  # int64 [modules, slots, ENTRIES, 4]
    scale,  # fp32 [modules, slots, ENTRIES]
    order,  # int32 [adapted tokens]
    items,  # int32 [items of the step, 8]
    head,  # int32: first item of this list, number of items
    u,  # fp32 [planes, adapted tokens, u_stride]
    y_units,  # y_stride / ALIGN: a size that is multiplied by ALIGN is known to be a multiple of it
    in_features,
    u_stride,
    plane_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPTH: tl.constexpr,  # as in shrink
    ALIGN: tl.constexpr,  # elements: every block begins at a multiple of it
    ENTRIES: tl.constexpr,
    SPLIT: tl.constexpr,  # each stretch has a plane of its own, else all is in the first
):
    """An item: a token tile times some columns of one module, all its entries, so that y has one writer."""
    first_item = tl.load(head)
    y_stride = y_units * ALIGN
    t = tl.arange(0, BLOCK_M)
    # A replayed graph has as many programs as it was captured with, and the step as many items as it has.
    for number in range(tl.program_id(0), tl.load(head + 1), tl.num_programs(0)):
        item = items + (first_item + number).to(tl.int64) * 8
        row, first, count = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
        begin, end = tl.multiple_of(tl.load(item + 3), ALIGN), tl.multiple_of(tl.load(item + 4), ALIGN)
        column = tl.load(item + 5)
        y_start, out_features = tl.multiple_of(tl.load(item + 6), ALIGN), tl.multiple_of(tl.load(item + 7), ALIGN)
        m_t = t < count
        o = begin + tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_N), ALIGN), ALIGN)
        m_o = o < end
        p_u = u + (first + t).to(tl.int64) * u_stride
        b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i_entry in tl.static_range(ENTRIES):
            p_entry = index + (row + i_entry) * 4
            rank, k = tl.load(p_entry + 2).to(tl.int32), tl.maximum(tl.load(p_entry + 3).to(tl.int32), 1)
            p_b = arena + tl.multiple_of(tl.load(p_entry + 1), 16)
            factor = tl.load(scale + row + i_entry)
            j = begin // (out_features // k)
            planes = tl.cdiv(in_features // k, DEPTH) if SPLIT else 1
            for start in range(0, rank, BLOCK_R):
                c = start + tl.arange(0, BLOCK_R)
                m_c = c < rank
                p_v = p_u[:, None] + (column + j * rank + c)[None, :]
                b_v = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
                for plane in range(planes):
                    m_v = m_t[:, None] & m_c[None, :]
                    b_v += tl.load(p_v + tl.cast(plane, tl.int64) * plane_stride, mask=m_v, other=0.0)
                p_w = p_b + c.to(tl.int64)[:, None] * out_features + o[None, :]
                b_b = tl.load(p_w, mask=m_c[:, None] & m_o[None, :], other=0.0)
                b_y = tl.dot((b_v * factor).to(b_b.dtype), b_b, b_y, input_precision="ieee")
            column += rank * k
        token = tl.load(order + first + t, mask=m_t, other=0).to(tl.int64)
        p_y = y + (token * y_stride + y_start)[:, None] + o[None, :]
        mask = m_t[:, None] & m_o[None, :]
        b_old = tl.load(p_y, mask=mask, other=0.0)
        tl.store(p_y, (b_old.to(tl.float32) + b_y).to(y.dtype.element_ty), mask=mask)
