"""y += u @ B for every item of a list. Knows no launch sizes."""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["y_units", "u_stride"])
def expand_kernel(
    y,  # [tokens, y_stride]
    arena,
    index,  # int64 [modules, slots, ENTRIES, 4]
    order,  # int32 [adapted tokens]
    items,  # int32 [items of the step, 8]
    head,  # int32: first item of this launch, number of items
    u,  # [adapted tokens, u_stride]
    y_units,  # y_stride / ALIGN: a size that is multiplied by ALIGN is known to be a multiple of it
    u_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALIGN: tl.constexpr,  # elements: every block begins at a multiple of it
    ENTRIES: tl.constexpr,
):
    """One program: a token tile times some columns of one module, all its entries, so that y has one writer."""
    if tl.program_id(0) >= tl.load(head + 1):  # a replayed graph may have more programs than the step has items
        return
    item = items + (tl.load(head) + tl.program_id(0)) * 8
    row, first, count = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
    begin, end = tl.multiple_of(tl.load(item + 3), ALIGN), tl.multiple_of(tl.load(item + 4), ALIGN)
    column = tl.load(item + 5)
    y_start, out_features = tl.multiple_of(tl.load(item + 6), ALIGN), tl.multiple_of(tl.load(item + 7), ALIGN)
    y_stride = y_units * ALIGN
    t = tl.arange(0, BLOCK_M)
    m_t = t < count
    o = begin + tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_N), ALIGN), ALIGN)
    m_o = o < end
    p_u = u + (first + t).to(tl.int64) * u_stride
    b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_entry in tl.static_range(ENTRIES):
        p_entry = index + (row + i_entry) * 4
        rank, k = tl.load(p_entry + 2).to(tl.int32), tl.load(p_entry + 3).to(tl.int32)
        p_b = arena + tl.multiple_of(tl.load(p_entry + 1), 16)
        j = begin // (out_features // tl.maximum(k, 1))
        for start in range(0, rank, BLOCK_R):
            c = start + tl.arange(0, BLOCK_R)
            m_c = c < rank
            p_v = p_u[:, None] + (column + j * rank + c)[None, :]
            b_v = tl.load(p_v, mask=m_t[:, None] & m_c[None, :], other=0.0)
            p_w = p_b + c.to(tl.int64)[:, None] * out_features + o[None, :]
            b_b = tl.load(p_w, mask=m_c[:, None] & m_o[None, :], other=0.0)
            b_y = tl.dot(b_v, b_b, b_y, input_precision="ieee")
        column += rank * k
    token = tl.load(order + first + t, mask=m_t, other=0).to(tl.int64)
    p_y = y + (token * y_stride + y_start)[:, None] + o[None, :]
    mask = m_t[:, None] & m_o[None, :]
    b_old = tl.load(p_y, mask=mask, other=0.0)
    tl.store(p_y, (b_old.to(tl.float32) + b_y).to(y.dtype.element_ty), mask=mask)
