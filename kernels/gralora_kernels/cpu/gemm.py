"""A linear layer for few rows, at the speed at which memory delivers the weight. Bit-identical for any batch."""

# ruff: noqa: PLR0917  # Numba takes arguments by position

from __future__ import annotations

import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from gralora_kernels.cpu.simd import load_scalar, store_scalar
from gralora_kernels.cpu.threads import region_lock
from gralora_kernels.cpu.tiles import ROWS, TOKENS, dot

FLOAT_BYTES = 4


@njit(nogil=True)
def _linear_rows(
    out: int, x: int, weight: int, bias: int, tokens: int, in_features: int, out_features: int, row: int
) -> None:
    """Up to four output features, from `row` on, for all tokens; `bias` 0: none."""
    stride = in_features * FLOAT_BYTES
    rows = min(ROWS, out_features - row)
    w = weight + row * stride
    w1, w2, w3 = w + min(1, rows - 1) * stride, w + min(2, rows - 1) * stride, w + (rows - 1) * stride
    for t in range(0, tokens, TOKENS):
        other = min(t + 1, tokens - 1)
        sums = dot(w, w1, w2, w3, x + t * stride, x + other * stride, in_features, ROWS * in_features)
        for lane in range(rows):
            offset = load_scalar(bias, row + lane) if bias else 0.0
            store_scalar(out, t * out_features + row + lane, sums[lane] + offset)
            store_scalar(out, other * out_features + row + lane, sums[ROWS + lane] + offset)


@njit(nogil=True, parallel=True, cache=True)
def _linear(
    parts: int, out: int, x: int, weight: int, bias: int, tokens: int, in_features: int, out_features: int
) -> None:
    groups = (out_features + ROWS - 1) // ROWS
    for part in prange(parts):
        for group in range(part * groups // parts, (part + 1) * groups // parts):
            _linear_rows(out, x, weight, bias, tokens, in_features, out_features, group * ROWS)


def linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out [tokens, out] = x [tokens, in] @ weight [out, in].T + bias, fp32 and contiguous throughout."""
    out_features, in_features = weight.shape
    tokens = x.numel() // in_features
    tensors = (out, x, weight) if bias is None else (out, x, weight, bias)
    if not all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors):
        raise ValueError("linear needs contiguous float32 tensors")
    if x.shape[-1] != in_features or out.numel() != tokens * out_features:
        raise ValueError(f"x {tuple(x.shape)} and out {tuple(out.shape)} do not fit weight {tuple(weight.shape)}")
    bias_address = 0 if bias is None else bias.data_ptr()
    with region_lock:
        _linear(
            get_num_threads(), out.data_ptr(), x.data_ptr(), weight.data_ptr(), bias_address, tokens, in_features,
            out_features,
        )  # fmt: skip
