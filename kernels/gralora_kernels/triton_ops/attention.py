"""Causal attention over paged keys and values, read where they lie. Knows no launch sizes and no layer.

A stretch of the context is summed up from scratch, and stretches are merged in order. What a query does not see adds
exactly nothing, so its result does not depend on which queries share its tile, nor on how its prompt was cut. Prompts
whose bits may depend on it are summed up in one go, with half of the registers.
"""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, ANN202, PLR0915, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from gralora_kernels.triton_ops.early import wait_for_others

NOTHING = tl.constexpr(-1e30)  # a score that is not seen: finite, so that differences are no NaN
LOG2_E = tl.constexpr(1.4426950408889634)
PARTS = tl.constexpr(8)


@triton.jit
def _with_sink(total, weight, largest, sink):
    """Sums and weights, and a sink among the weights."""
    score = sink.to(tl.float32) * LOG2_E
    new = tl.maximum(largest, score)
    factor = tl.exp2(largest - new)
    return total * factor[:, None], weight * factor + tl.exp2(score - new)


@triton.jit(do_not_specialize=["window", "table_stride"])
def attention_kernel(
    out,  # [tokens, heads, D]
    q,  # [tokens, Q_ROW, D]: the first heads of a row are the queries
    keys,  # [pages, PAGE, KV_HEADS, D]
    values,  # [pages, PAGE, KV_HEADS, D]
    page_table,  # int32 [rows, table_stride]
    query_starts,  # int32 [rows + 1]
    context_lens,  # int32 [rows]
    items,  # int32 [items, 8]
    counts,  # int32: number of items, number of merges
    partial_sums,  # fp32 [partials, heads, D]
    partial_stats,  # fp32 [partials, heads, 2]: largest score, sum of weights
    sinks,  # [heads]: a score of each head that has no value; or None
    table_stride,
    window,  # positions that a query sees, its own included; 0: all
    scale,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    Q_ROW: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_HEADS: tl.constexpr,  # of a group, at most BLOCK_M
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,  # elements: D is a multiple of it
    HAS_SOFTCAP: tl.constexpr,
    IN_ONE_GO: tl.constexpr,  # all that an item sees, without a sum for each stretch
):
    """An item, for query heads of one KV head: rows of the tile are tokens times heads. Programs take turns, because a
    replayed graph has as many as it was captured with."""
    wait_for_others()
    group: tl.constexpr = HEADS // KV_HEADS
    blocks: tl.constexpr = (group + TILE_HEADS - 1) // TILE_HEADS  # programs that share the group
    kv_head = tl.program_id(1) // blocks
    m = tl.arange(0, BLOCK_M)
    of_group = tl.program_id(1) % blocks * TILE_HEADS + m % TILE_HEADS
    head = kv_head * group + of_group
    d = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_D), ALIGN), ALIGN)
    m_d = d < D
    for number in range(tl.program_id(0), tl.load(counts), tl.num_programs(0)):
        item = items + number * 8
        row, first, count = tl.load(item), tl.load(item + 1), tl.load(item + 2)
        begin, end, partial = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
        before = tl.load(context_lens + row) - tl.load(query_starts + row + 1)  # position of a token, less its number
        m_m = (m < count * TILE_HEADS) & (of_group < group)
        token = (first + m // TILE_HEADS).to(tl.int64)
        position = before + first + m // TILE_HEADS
        last = before + first + count  # the first position that nobody sees
        low = tl.maximum(last - count - window + 1, 0) if window > 0 else 0  # the first that anybody sees
        p_q = q + ((token * Q_ROW + head) * D)[:, None] + d[None, :]
        b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        weight = tl.zeros([BLOCK_M], tl.float32)
        largest = tl.full([BLOCK_M], NOTHING, tl.float32)
        s_total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        s_weight = tl.zeros([BLOCK_M], tl.float32)
        s_largest = tl.full([BLOCK_M], NOTHING, tl.float32)
        behind = tl.minimum(end * SPLIT, last)
        # One loop over all stretches, so that the next tile is on its way while a stretch ends.
        for start in range(tl.maximum(begin, low // SPLIT) * SPLIT, behind, BLOCK_N):
            p = start + tl.arange(0, BLOCK_N)
            m_p = p < last
            page = tl.load(page_table + row * table_stride + p // PAGE, mask=m_p, other=0).to(tl.int64)
            offset = ((page * PAGE + p % PAGE) * KV_HEADS + kv_head) * D
            mask = m_p[:, None] & m_d[None, :]
            b_k = tl.load(keys + offset[:, None] + d[None, :], mask=mask, other=0.0)
            b_v = tl.load(values + offset[:, None] + d[None, :], mask=mask, other=0.0)
            scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
            if HAS_SOFTCAP:
                scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
            is_seen = (p[None, :] <= position[:, None]) & ((window <= 0) | (p[None, :] > position[:, None] - window))
            scores = tl.where(is_seen, scores * LOG2_E, NOTHING)
            new = tl.maximum(s_largest, tl.max(scores, 1))
            weights = tl.where(is_seen, tl.exp2(scores - new[:, None]), 0.0)
            factor = tl.exp2(s_largest - new)
            s_total = tl.dot(weights.to(b_v.dtype), b_v, s_total * factor[:, None], input_precision="ieee")
            s_weight = s_weight * factor + tl.sum(weights, 1)
            s_largest = new
            if not IN_ONE_GO and ((start + BLOCK_N) % SPLIT == 0 or start + BLOCK_N >= behind):
                # Exactly the one if the other has seen nothing. `merge_kernel` does the same.
                new = tl.maximum(largest, s_largest)
                factor, s_factor = tl.exp2(largest - new), tl.exp2(s_largest - new)
                total = tl.fma(total, tl.broadcast_to(factor[:, None], total.shape), s_total * s_factor[:, None])
                weight, largest = tl.fma(weight, factor, s_weight * s_factor), new
                s_total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                s_weight = tl.zeros([BLOCK_M], tl.float32)
                s_largest = tl.full([BLOCK_M], NOTHING, tl.float32)
        if IN_ONE_GO:
            total, weight, largest = s_total, s_weight, s_largest
        result = head if partial < 0 else partial * HEADS + head
        if partial < 0:
            if sinks is not None:
                b_sink = tl.load(sinks + head, mask=of_group < group, other=0.0)
                total, weight = _with_sink(total, weight, largest, b_sink)
            p_out = out + ((token * HEADS + head) * D)[:, None] + d[None, :]
            tl.store(p_out, (total / weight[:, None]).to(out.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
        else:
            p_sums = partial_sums + (result.to(tl.int64) * D)[:, None] + d[None, :]
            tl.store(p_sums, total, mask=m_m[:, None] & m_d[None, :])
            tl.store(partial_stats + result.to(tl.int64) * 2, largest, mask=m_m)
            tl.store(partial_stats + result.to(tl.int64) * 2 + 1, weight, mask=m_m)


@triton.jit(do_not_specialize=["window"])
def merge_kernel(
    out,  # [tokens, heads, D]
    merges,  # int32 [merges, 8]
    counts,  # int32: number of items, number of merges
    context_lens,  # int32 [rows]
    partial_sums,  # fp32 [partials, heads, D]
    partial_stats,  # fp32 [partials, heads, 2]
    sinks,  # [heads] or None
    window,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One head of a token whose result is in parts. Parts wholly before the window were not written."""
    wait_for_others()
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    m_d = d < D
    for number in range(tl.program_id(0), tl.load(counts + 1), tl.num_programs(0)):
        merge = merges + number * 8
        token, first, count = tl.load(merge).to(tl.int64), tl.load(merge + 1), tl.load(merge + 2)
        length, each = tl.load(context_lens + tl.load(merge + 3)), tl.load(merge + 4)
        low = tl.maximum(length - window, 0) if window > 0 else 0
        total = tl.zeros([1, BLOCK_D], tl.float32)
        weight = tl.zeros([1], tl.float32)
        largest = tl.full([1], NOTHING, tl.float32)
        for part in range(low // SPLIT // each, count, PARTS):  # so many are asked for at once
            for i_part in tl.static_range(PARTS):
                m_part = part + i_part < count  # one that is not there has seen nothing
                result = (first + part + i_part).to(tl.int64) * HEADS + head
                b_sum = tl.load(partial_sums + result * D + d, mask=m_d & m_part, other=0.0)
                p_stats = partial_stats + result * 2 + tl.zeros([1], tl.int32)
                s_weight = tl.load(p_stats + 1, mask=m_part, other=0.0)
                s_total, s_largest = b_sum[None, :], tl.load(p_stats, mask=m_part, other=NOTHING)
                new = tl.maximum(largest, s_largest)
                factor, s_factor = tl.exp2(largest - new), tl.exp2(s_largest - new)
                total = tl.fma(total, tl.broadcast_to(factor[:, None], total.shape), s_total * s_factor[:, None])
                weight, largest = tl.fma(weight, factor, s_weight * s_factor), new
        if sinks is not None:
            total, weight = _with_sink(total, weight, largest, tl.load(sinks + head))
        b_out = total / weight[:, None]
        p_out = out + (token * HEADS + head) * D + d[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_d[None, :])
