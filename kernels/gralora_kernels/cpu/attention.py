"""Causal attention over paged keys and values, read where they lie. Knows no scheduler and no model.

Keys lie in pages [kv_heads, head_dim, page_size], values in pages [kv_heads, page_size, head_dim]: a page of either is
a panel for the microkernel. Prompts and decoding rows go the same way: each query keeps a running maximum and sum over
blocks of positions that are fixed for all, so its result depends neither on its batch nor on how its prompt was cut.
"""

# ruff: noqa: PLR0917  # Numba takes arguments by position

# mypy: disable-error-code="no-any-return, return-value"

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from gralora_kernels.cpu.linear import FLOAT_BYTES, row_numbers
from gralora_kernels.cpu.microkernel import FROM_OUTPUT, FROM_ZERO, PANEL, multiply
from gralora_kernels.cpu.rows import scale_into
from gralora_kernels.cpu.separate import Separate, kernel
from gralora_kernels.cpu.simd import (
    LANES,
    add,
    exp,
    largest,
    load,
    load_int32,
    load_scalar,
    maximum,
    prefetch,
    splat,
    store,
    store_int32,
    store_scalar,
    tanh,
    total,
)
from gralora_kernels.cpu.simd import (
    multiply as times,
)
from gralora_kernels.cpu.team import LINE
from gralora_kernels.cpu.threads import region_lock

BLOCK = 64  # positions between two rescalings
MAX_QUERIES = 24  # rows of a piece: queries of one key head, of as many tokens as fit

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


def attention_rows(group: int) -> int:
    """The most queries of one piece."""
    return max(group, MAX_QUERIES)


def scratch_bytes(group: int, head_dim: int, page_size: int) -> int:
    """What one thread needs."""
    rows = attention_rows(group)
    return rows * (2 * 4 + (2 + _positions(page_size) + head_dim) * FLOAT_BYTES) + 64


@njit(nogil=True)
def _positions(page_size: int) -> int:
    """Of a block: whole pages."""
    pages = max(1, BLOCK // page_size) * page_size
    return (pages + LANES - 1) // LANES * LANES


@njit(nogil=True)
def _cap(scores: int, positions: int, softcap: float) -> None:
    """scores = softcap * tanh(scores / softcap)."""
    inverse, caps = splat(np.float32(1.0 / softcap)), splat(np.float32(softcap))
    for i in range(0, positions, LANES):
        store(scores, i, times(caps, tanh(times(load(scores, i), inverse))))


@njit(nogil=True)
def _mask(scores: int, low: int, high: int, positions: int, scale: float, softcap: float) -> None:
    """scores = scale * scores, within the cap if there is one, and minus infinity outside of low .. high."""
    scale_into(scores, scores, positions, scale)
    if softcap != 0.0:
        _cap(scores, positions, softcap)
    for i in range(low):
        store_scalar(scores, i, np.float32(-np.inf))
    for i in range(max(high, 0), positions):
        store_scalar(scores, i, np.float32(-np.inf))


@njit(nogil=True)
def _weigh(scores: int, low: int, high: int, positions: int, scale: float, softcap: float, state: int) -> float:
    """Scores of one query in a block -> weights, zero outside of low .. high; returns what the sums so far shrink by.

    `state` holds the query's maximum and its sum of weights.
    """
    if low >= high:
        for i in range(0, positions, LANES):
            store(scores, i, splat(np.float32(0.0)))
        return np.float32(1.0)
    _mask(scores, low, high, positions, scale, softcap)
    peaks = load(scores, 0)
    for i in range(LANES, positions, LANES):
        peaks = maximum(peaks, load(scores, i))
    before = load_scalar(state, 0)
    peak = max(before, largest(peaks))
    sums = splat(np.float32(0.0))
    lowered = splat(-peak)
    for i in range(0, positions, LANES):
        weights = exp(add(load(scores, i), lowered))
        store(scores, i, weights)
        sums = add(sums, weights)
    shrink = np.float32(math.exp(before - peak))
    store_scalar(state, 0, peak)
    store_scalar(state, 1, load_scalar(state, 1) * shrink + total(sums))
    return shrink


@njit(nogil=True)
def _inverse_weight(state: int, sinks: int, head: int) -> float:
    """What a query's sums are multiplied by in the end: its weights, and its head's sink's, are one together."""
    weight = load_scalar(state, 1)
    if sinks:
        weight += np.float32(math.exp(load_scalar(sinks, head) - load_scalar(state, 0)))
    return np.float32(1.0) / weight


@njit(nogil=True)
def _fetch(address: int, count: int) -> None:
    """Ask for `count` numbers, so that they are there when they are read: a page is too short for the processor to see
    that it will be read to its end."""
    for i in range(0, count, LINE // FLOAT_BYTES):
        prefetch(address, i)


@Separate
def attend_piece(
    first: int, tokens: int, start: int, kv_head: int, pages: int, q: int, q_width: int, out: int, heads: int,
    kv_heads: int, head_dim: int, keys: int, values: int, page_size: int, scale: float, softcap: float, window: int,
    sinks: int, scratch: int, iota: int,
) -> None:  # fmt: skip
    """All queries of one key head, for `tokens` tokens from `first` on, which stand at positions from `start` on.

    q is [tokens, q_width heads, head_dim], out [tokens, heads, head_dim]; `pages` int32, of this sequence; softcap
    and window 0: no limit. `sinks` [heads]: a score of each head that has no value; 0: there is none.
    """
    group = heads // kv_heads
    rows = tokens * group
    positions = _positions(page_size)
    page_numel = head_dim * page_size
    q_index = scratch
    out_index = q_index + 4 * rows
    state = out_index + 4 * rows
    sums = state + 2 * FLOAT_BYTES * rows
    scores = sums + FLOAT_BYTES * rows * head_dim
    for row in range(rows):
        token, head = first + row // group, kv_head * group + row % group
        store_int32(q_index, row, token * q_width + head)
        store_int32(out_index, row, token * heads + head)
        store_scalar(state, 2 * row, np.float32(-np.inf))
        store_scalar(state, 2 * row + 1, np.float32(0.0))
    for i in range(rows * head_dim):
        store_scalar(sums, i, np.float32(0.0))
    end = start + tokens
    begin = max(0, start - window + 1) if window else 0
    step = max(1, BLOCK // page_size) * page_size
    for block in range(begin // step * step, end, step):
        block_end = min(block + step, end)
        for at in range(block, block_end, page_size):
            page = (load_int32(pages, at // page_size) * kv_heads + kv_head) * page_numel
            _fetch(values + page * FLOAT_BYTES, min(page_size, block_end - at) * head_dim)
            for c in range(0, page_size, PANEL):
                columns = min(PANEL, page_size - c)
                multiply(
                    rows, q, head_dim, q_index, scores + (at - block + c) * FLOAT_BYTES, positions, iota,
                    keys + (page + c) * FLOAT_BYTES, page_size, head_dim, FROM_ZERO, columns, columns == PANEL,
                )  # fmt: skip
        for row in range(rows):
            position = start + row // group
            low = max(0, position - window + 1 - block) if window else 0
            high = min(block_end, position + 1) - block
            weights = scores + row * positions * FLOAT_BYTES
            shrink = _weigh(weights, low, high, positions, scale, softcap, state + 2 * row * FLOAT_BYTES)
            if shrink != 1.0:
                own = sums + row * head_dim * FLOAT_BYTES
                scale_into(own, own, head_dim, shrink)
        for at in range(block, block_end, page_size):
            page = (load_int32(pages, at // page_size) * kv_heads + kv_head) * page_numel
            if at + step < end:  # the keys of the next block
                following = (load_int32(pages, (at + step) // page_size) * kv_heads + kv_head) * page_numel
                _fetch(keys + following * FLOAT_BYTES, page_numel)
            for c in range(0, head_dim, PANEL):
                columns = min(PANEL, head_dim - c)
                multiply(
                    rows, scores + (at - block) * FLOAT_BYTES, positions, iota, sums + c * FLOAT_BYTES, head_dim, iota,
                    values + (page + c) * FLOAT_BYTES, head_dim, min(page_size, block_end - at), FROM_OUTPUT, columns,
                    columns == PANEL,
                )  # fmt: skip
    for row in range(rows):
        target = out + load_int32(out_index, row) * head_dim * FLOAT_BYTES
        inverse = _inverse_weight(state + 2 * row * FLOAT_BYTES, sinks, kv_head * group + row % group)
        scale_into(sums + row * head_dim * FLOAT_BYTES, target, head_dim, inverse)


def attention_pieces(query_starts: Int32s, context_lens: Int32s, group: int) -> Int64s:
    """Work of a step: (row, first token, tokens, position of the first token), a row's tokens cut into equal pieces."""
    size = max(1, MAX_QUERIES // group)
    pieces = [
        (row, at, min(size, end - at), length - (end - at))
        for row, (begin, end, length) in enumerate(
            zip(query_starts[:-1].tolist(), query_starts[1:].tolist(), context_lens.tolist(), strict=True)
        )
        for at in range(begin, end, size)
    ]
    return np.array(pieces, np.int64).reshape(-1, 4)


@kernel(
    "void(int64, int64[:, ::1], int32[:, ::1], int64, int64, int64, int64, int64, int64, int64, int64, float64, "
    "float64, int64, int64, int64, int64, int64)",
    parallel=True,
)
def _attend(
    parts: int, pieces: Int64s, page_table: Int32s, q: int, out: int, heads: int, kv_heads: int, head_dim: int,
    keys: int, values: int, page_size: int, scale: float, softcap: float, window: int, sinks: int, scratch: int,
    scratch_size: int, iota: int,
) -> None:  # fmt: skip
    count = pieces.shape[0] * kv_heads
    for part in prange(parts):
        for i in range(part, count, parts):
            piece = pieces[i // kv_heads]
            pages = page_table.ctypes.data + 4 * page_table.shape[1] * piece[0]
            attend_piece(
                piece[1], piece[2], piece[3], i % kv_heads, pages, q, heads, out, heads, kv_heads, head_dim, keys,
                values, page_size, scale, softcap, window, sinks, scratch + part * scratch_size, iota,
            )  # fmt: skip


def paged_attention(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """q, out [tokens, heads, head_dim]: row i has tokens query_starts[i] .. query_starts[i + 1], the last of its
    context of context_lens[i]; window and softcap 0: no limit. keys [pages, kv_heads, head_dim, page_size], values
    [pages, kv_heads, page_size, head_dim]; page_table int32 [rows, max_pages]; sinks [heads]: scores without a value.
    """
    for tensor in (out, q, keys, values, *([] if sinks is None else [sinks])):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"paged attention needs contiguous float32, got {tensor.dtype} {tuple(tensor.shape)}")
    heads, head_dim = q.shape[1:]
    kv_heads, page_size = values.shape[1:3]
    rows, longest = len(context_lens), int(context_lens.max())
    if out.shape != q.shape or heads % kv_heads or keys.shape[1:] != (kv_heads, head_dim, page_size):
        raise ValueError(f"shapes do not fit: out {out.shape}, q {q.shape}, k {keys.shape}, v {values.shape}")
    if sinks is not None and len(sinks) != heads:
        raise ValueError(f"{len(sinks)} sinks for {heads} heads")
    if len(query_starts) != rows + 1 or len(page_table) != rows or longest > page_table.shape[1] * page_size:
        raise ValueError(f"{rows} rows, longest context {longest}, but the page table is {tuple(page_table.shape)}")
    group = heads // kv_heads
    parts = get_num_threads()
    size = scratch_bytes(group, head_dim, page_size)
    scratch = np.empty(parts * size, np.uint8)
    with region_lock:
        _attend(
            parts, attention_pieces(query_starts.numpy(), context_lens.numpy(), group), page_table.numpy(),
            q.data_ptr(), out.data_ptr(), heads, kv_heads, head_dim, keys.data_ptr(), values.data_ptr(), page_size,
            scale, softcap, window, 0 if sinks is None else sinks.data_ptr(), scratch.ctypes.data, size,
            row_numbers(attention_rows(group)),
        )  # fmt: skip
