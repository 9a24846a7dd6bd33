"""y = gain * (y + scale * u @ B) + shift for every item of a list. Knows no launch sizes."""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, ANN202, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["head_at", "order_at", "y_units", "in_features", "u_stride", "plane_stride"])
def expand_kernel(
    y,  # [tokens, y_stride]
    arena,
    index,  # int64 [modules, slots, ENTRIES, 4]
    scale,  # fp32 [modules, slots, ENTRIES]
    affine,  # int64 [modules, slots]: 1 + where gains and shifts lie in the arena, fp32 [2, out]; 0: there are none
    words,  # int32: heads (first item of a list, number of items), order [adapted tokens]
    items,  # int32 [items of the step, 8]
    u,  # fp32 [planes, adapted tokens, u_stride]
    head_at,  # of this list
    order_at,
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
    head, order = words + head_at, words + order_at
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
        token = tl.load(order + first + t, mask=m_t, other=0).to(tl.int64)
        p_y = y + (token * y_stride + y_start)[:, None]
        p_u = (u + (first + t).to(tl.int64) * u_stride)[:, None]
        p_affine = tl.load(affine + row // ENTRIES)
        rank, other_ranks = tl.load(index + row * 4 + 2).to(tl.int32), 0
        for i_entry in tl.static_range(1, ENTRIES):
            other_ranks += tl.load(index + (row + i_entry) * 4 + 2).to(tl.int32)
        if (rank <= BLOCK_R) & (other_ranks == 0):
            _add_few_ranks(
                p_y, m_t, p_u + column, arena, index + row * 4, scale + row, rank, begin, end, out_features,
                in_features, plane_stride, BLOCK_M, BLOCK_N, BLOCK_R, DEPTH, ALIGN, SPLIT,
            )  # fmt: skip
        else:
            _add_all_ranks(
                p_y, m_t, p_u + column, arena, index + row * 4, scale + row, begin, end, out_features,
                in_features, plane_stride, BLOCK_M, BLOCK_N, BLOCK_R, DEPTH, ALIGN, ENTRIES, SPLIT,
            )  # fmt: skip
        if p_affine > 0:  # fp32 in any arena
            p_gain = (arena + tl.multiple_of(p_affine - 1, 16)).to(tl.pointer_type(tl.float32), bitcast=True)
            _scale_and_shift(p_y, m_t, p_gain, begin, end, out_features, BLOCK_N, ALIGN)


@triton.jit
def _add_few_ranks(
    p_y, m_t, p_u, arena, entry, scale, rank, begin, end, out_features, in_features, plane_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Most adapters: what they add to some columns is one product, whose weights come while the last is computed."""
    k = tl.maximum(tl.load(entry + 3).to(tl.int32), 1)
    p_b = arena + tl.multiple_of(tl.load(entry + 1), 16)
    j = begin // (out_features // k)
    planes = tl.cdiv(in_features // k, DEPTH) if SPLIT else 1
    c = tl.arange(0, BLOCK_R)
    m_c = c < rank
    b_v = _summed(p_u + (j * rank + c)[None, :], m_t[:, None] & m_c[None, :], planes, plane_stride)
    b_s = (b_v * tl.load(scale)).to(arena.dtype.element_ty)
    for start in range(begin, end, BLOCK_N):
        o = start + tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_N), ALIGN), ALIGN)
        m_o = o < end
        p_w = p_b + c.to(tl.int64)[:, None] * out_features + o[None, :]
        b_b = tl.load(p_w, mask=m_c[:, None] & m_o[None, :], other=0.0)
        m_y = m_t[:, None] & m_o[None, :]
        b_old = tl.load(p_y + o[None, :], mask=m_y, other=0.0)
        b_y = tl.dot(b_s, b_b, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), input_precision="ieee")
        tl.store(p_y + o[None, :], (b_old.to(tl.float32) + b_y).to(b_old.dtype), mask=m_y)


@triton.jit
def _add_all_ranks(
    p_y, m_t, p_u, arena, entry, scale, begin, end, out_features, in_features, plane_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr,
    ENTRIES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Any rank, and all entries of a hybrid, in one order."""
    for start in range(begin, end, BLOCK_N):
        o = start + tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_N), ALIGN), ALIGN)
        m_o = o < end
        b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        column = 0
        for i_entry in tl.static_range(ENTRIES):
            p_entry = entry + i_entry * 4
            rank, k = tl.load(p_entry + 2).to(tl.int32), tl.maximum(tl.load(p_entry + 3).to(tl.int32), 1)
            p_b = arena + tl.multiple_of(tl.load(p_entry + 1), 16)
            factor = tl.load(scale + i_entry)
            j = begin // (out_features // k)
            planes = tl.cdiv(in_features // k, DEPTH) if SPLIT else 1
            for first in range(0, rank, BLOCK_R):
                c = first + tl.arange(0, BLOCK_R)
                m_c = c < rank
                p_v = p_u + (column + j * rank + c)[None, :]
                b_v = _summed(p_v, m_t[:, None] & m_c[None, :], planes, plane_stride)
                p_w = p_b + c.to(tl.int64)[:, None] * out_features + o[None, :]
                b_b = tl.load(p_w, mask=m_c[:, None] & m_o[None, :], other=0.0)
                b_y = tl.dot((b_v * factor).to(b_b.dtype), b_b, b_y, input_precision="ieee")
            column += rank * k
        m_y = m_t[:, None] & m_o[None, :]
        b_old = tl.load(p_y + o[None, :], mask=m_y, other=0.0)
        tl.store(p_y + o[None, :], (b_old.to(tl.float32) + b_y).to(b_old.dtype), mask=m_y)


@triton.jit
def _scale_and_shift(
    p_y, m_t, p_gain, begin, end, out_features, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Few adapters need it: what all others do has no register less for it."""
    tl.debug_barrier()  # what is read here, other threads may have written
    for start in range(begin, end, BLOCK_N):
        o = start + tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_N), ALIGN), ALIGN)
        m_o = o < end
        m_y = m_t[:, None] & m_o[None, :]
        b_gain = tl.load(p_gain + o, mask=m_o, other=0.0)
        b_shift = tl.load(p_gain + out_features + o, mask=m_o, other=0.0)
        b_sum = tl.load(p_y + o[None, :], mask=m_y, other=0.0)
        b_y = b_sum.to(tl.float32) * b_gain[None, :] + b_shift[None, :]
        tl.store(p_y + o[None, :], b_y.to(b_sum.dtype), mask=m_y)


@triton.jit
def _summed(p_v, mask, planes, plane_stride):
    """u of a tile: its planes, added up in their order."""
    b_v = tl.zeros(p_v.shape, tl.float32)
    for plane in range(planes):
        b_v += tl.load(p_v + tl.cast(plane, tl.int64) * plane_stride, mask=mask, other=0.0)
    return b_v
