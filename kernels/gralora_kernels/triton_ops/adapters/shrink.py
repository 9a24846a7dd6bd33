"""u = scale * x @ A for every item of a list, written already exchanged. Knows no launch sizes."""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["in_units", "u_stride"])
def shrink_kernel(
    x,  # [tokens, in]
    arena,
    index,  # int64 [modules, slots, ENTRIES, 4]
    scale,  # fp32 [modules, slots, ENTRIES]
    order,  # int32 [adapted tokens]
    items,  # int32 [items of the step, 8]
    head,  # int32: first item of this launch, number of items
    u,  # [adapted tokens, u_stride]
    in_units,  # in_features / ALIGN: a size that is multiplied by ALIGN is known to be a multiple of it
    u_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,  # elements: every block begins at a multiple of it
):
    """One program: a token tile times some rank rows of one block of one entry."""
    if tl.program_id(0) >= tl.load(head + 1):  # a replayed graph may have more programs than the step has items
        return
    item = items + (tl.load(head) + tl.program_id(0)) * 8
    row, first, count = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
    rank, k, n, p_first, column = (
        tl.load(item + 3), tl.load(item + 4), tl.load(item + 5), tl.load(item + 6), tl.load(item + 7)
    )  # fmt: skip
    in_features = in_units * ALIGN
    width = tl.multiple_of(in_features // k, ALIGN)
    t = tl.arange(0, BLOCK_M)
    m_t = t < count
    token = tl.load(order + first + t, mask=m_t, other=0).to(tl.int64)
    p = p_first + tl.arange(0, BLOCK_R)
    m_p = p < rank
    p_x = x + token * in_features + n * width
    p_a = arena + tl.multiple_of(tl.load(index + row * 4), 16) + n * width + p.to(tl.int64) * in_features
    b_u = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, width, BLOCK_K):
        i = start + tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_K), ALIGN), ALIGN)
        m_i = i < width
        b_x = tl.load(p_x[:, None] + i[None, :], mask=m_t[:, None] & m_i[None, :], other=0.0)
        b_a = tl.load(p_a[None, :] + i[:, None], mask=m_p[None, :] & m_i[:, None], other=0.0)
        b_u = tl.dot(b_x, b_a, b_u, input_precision="ieee")
    b_u *= tl.load(scale + row)
    strip = rank // k
    exchanged = column + (p // strip) * rank + n * strip + p % strip  # the block exchange
    p_u = u + (first + t).to(tl.int64)[:, None] * u_stride + exchanged[None, :]
    tl.store(p_u, b_u.to(u.dtype.element_ty), mask=m_t[:, None] & m_p[None, :])
