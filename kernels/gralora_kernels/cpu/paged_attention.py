"""Attention of single queries over paged keys and values, read where they lie. Knows no scheduler and no model."""

# ruff: noqa: PLR0917  # Numba takes arguments by position

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from gralora_kernels.cpu.simd import LANES, add, exp, fma, load, load_part, splat, store, store_part, total
from gralora_kernels.cpu.threads import region_lock
from gralora_kernels.cpu.tiles import ROWS, add_scaled, dot

FLOAT_BYTES = 4

Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@njit(nogil=True)
def _addresses(base: int, pages: Int32s, position: int, end: int, page_size: int, stride: int) -> tuple[int, ...]:
    """Where four consecutive positions' vectors lie; past the end, the last one again."""
    p0, p1 = position, min(position + 1, end - 1)
    p2, p3 = min(position + 2, end - 1), min(position + 3, end - 1)
    return (
        base + (pages[p0 // page_size] * page_size + p0 % page_size) * stride,
        base + (pages[p1 // page_size] * page_size + p1 % page_size) * stride,
        base + (pages[p2 // page_size] * page_size + p2 % page_size) * stride,
        base + (pages[p3 // page_size] * page_size + p3 % page_size) * stride,
    )


@njit(nogil=True)
def _scores(
    scores: Floats, q: int, group: int, head_dim: int, k: int, pages: Int32s, begin: int, end: int, page_size: int,
    stride: int, scale: float,
) -> None:  # fmt: skip
    """scores[head, position - begin] = scale * q[head] . key[position]"""
    for position in range(begin, end, ROWS):
        k0, k1, k2, k3 = _addresses(k, pages, position, end, page_size, stride)
        for head in range(0, group, 2):
            other = min(head + 1, group - 1)
            q0, q1 = q + head * head_dim * FLOAT_BYTES, q + other * head_dim * FLOAT_BYTES
            sums = dot(k0, k1, k2, k3, q0, q1, head_dim, 0)
            for lane in range(min(ROWS, end - position)):
                scores[head, position - begin + lane] = sums[lane] * scale
                scores[other, position - begin + lane] = sums[ROWS + lane] * scale


@njit(nogil=True)
def _softmax(scores: Floats, length: int) -> None:
    """One head's scores, in place; a whole number of vectors is written, zeros past `length`."""
    largest = np.float32(-np.inf)
    for i in range(length):
        largest = max(largest, scores[i])
    address = scores.ctypes.data
    sums = splat(0.0)
    low = splat(-largest)
    for i in range(0, length, LANES):
        weights = exp(add(load(address, i), low))
        if i + LANES > length:
            store(address, i, weights)
            weights = load_part(address, i, length - i)
        store(address, i, weights)
        sums = add(sums, weights)
    inverse = splat(np.float32(1.0) / total(sums))
    for i in range(0, length, LANES):
        store(address, i, fma(load(address, i), inverse, splat(0.0)))


@njit(nogil=True)
def _weigh_values(
    out: int, weights: Floats, group: int, head_dim: int, v: int, pages: Int32s, begin: int, end: int, page_size: int,
    stride: int,
) -> None:  # fmt: skip
    """out[head] = sum over positions of weights[head, position - begin] * value[position]; padding weighs zero."""
    zero = splat(0.0)
    for i in range(0, group * head_dim, LANES):
        store_part(out, i, zero, min(LANES, group * head_dim - i))
    for position in range(begin, end, ROWS):
        v0, v1, v2, v3 = _addresses(v, pages, position, end, page_size, stride)
        i = position - begin
        for head in range(0, group, 2):
            other = min(head + 1, group - 1)
            w, z = weights[head], weights[other]
            factors = (w[i], w[i + 1], w[i + 2], w[i + 3], z[i], z[i + 1], z[i + 2], z[i + 3])
            out0, out1 = out + head * head_dim * FLOAT_BYTES, out + other * head_dim * FLOAT_BYTES
            add_scaled(out0, out1, v0, v1, v2, v3, factors, head_dim, 0)


@njit(nogil=True, parallel=True, cache=True)
def _attend(
    parts: int, out: int, q: int, heads: int, head_dim: int, k: int, v: int, kv_heads: int, page_size: int,
    page_table: Int32s, context_lens: Int32s, longest: int, scale: float, window: int,
) -> None:  # fmt: skip
    """Pieces are (row, kv head), dealt out in turn: long contexts are spread over the threads."""
    group = heads // kv_heads
    stride = kv_heads * head_dim * FLOAT_BYTES
    for part in prange(parts):
        scores = np.empty((group, (longest // LANES + 1) * LANES), np.float32)
        for piece in range(part, context_lens.shape[0] * kv_heads, parts):
            row, kv_head = piece // kv_heads, piece % kv_heads
            end = context_lens[row]
            begin = max(0, end - window) if window else 0
            shift = kv_head * head_dim * FLOAT_BYTES
            first = (row * heads + kv_head * group) * head_dim * FLOAT_BYTES
            pages = page_table[row]
            _scores(scores, q + first, group, head_dim, k + shift, pages, begin, end, page_size, stride, scale)
            for head in range(group):
                _softmax(scores[head], end - begin)
            _weigh_values(out + first, scores, group, head_dim, v + shift, pages, begin, end, page_size, stride)


def paged_attention(
    out: Tensor,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
) -> None:
    """q, out [rows, heads, head_dim]; one query per row, at the last position of its context; window 0: no limit.

    k_pages, v_pages [pages, page_size, kv_heads, head_dim]; page_table int32 [rows, max_pages]; context_lens int32
    [rows].
    A prompt's tokens can be rows too, each with its own context length.
    """
    for tensor in (out, q, k_pages, v_pages):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"paged attention needs contiguous float32, got {tensor.dtype} {tuple(tensor.shape)}")
    rows, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    lengths: Int32s = context_lens.numpy()
    longest = int(lengths.max(initial=0))
    if out.shape != q.shape or v_pages.shape != k_pages.shape or heads % kv_heads or head_dim != k_pages.shape[3]:
        raise ValueError(f"shapes do not fit: out {out.shape}, q {q.shape}, k {k_pages.shape}, v {v_pages.shape}")
    if len(lengths) != rows or len(page_table) != rows or longest > page_table.shape[1] * page_size:
        raise ValueError(f"{rows} rows, longest context {longest}, but the page table is {tuple(page_table.shape)}")
    with region_lock:
        _attend(
            get_num_threads(), out.data_ptr(), q.data_ptr(), heads, head_dim, k_pages.data_ptr(), v_pages.data_ptr(),
            kv_heads, page_size, page_table.numpy(), lengths, longest, scale, window,
        )  # fmt: skip
