"""What a decoder layer does to one token alone: norm, rotary embedding, activation. Addresses are integers."""

# ruff: noqa: PLR0917  # Numba takes arguments by position

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from gralora_kernels.cpu.microkernel import FLOAT16, NATIVE
from gralora_kernels.cpu.simd import (
    LANES,
    add,
    fma,
    gelu_tanh,
    load,
    load_bfloat16,
    load_float16,
    load_part,
    load_scalar,
    maximum,
    silu,
    splat,
    store,
    store_part,
    store_scalar,
    total,
)  # fmt: skip
from gralora_kernels.cpu.simd import (
    multiply as times,
)

SILU, GELU_TANH, SQUARED_RELU = 0, 1, 2


@njit(nogil=True)
def rms_norm(x: int, weight: int, out: int, features: int, eps: float) -> None:
    """out = weight * x / sqrt(mean(x^2) + eps); out may be x."""
    squares = splat(np.float32(0.0))
    whole = features - features % LANES
    for i in range(0, whole, LANES):
        value = load(x, i)
        squares = fma(value, value, squares)
    if whole < features:
        value = load_part(x, whole, features - whole)
        squares = fma(value, value, squares)
    factor = splat(np.float32(1.0 / math.sqrt(total(squares) / features + eps)))
    for i in range(0, whole, LANES):
        store(out, i, times(load(weight, i), times(load(x, i), factor)))
    if whole < features:
        rest = features - whole
        value = times(load_part(weight, whole, rest), times(load_part(x, whole, rest), factor))
        store_part(out, whole, value, rest)


@njit(nogil=True)
def layer_norm(x: int, weight: int, bias: int, out: int, features: int, eps: float) -> None:
    """out = weight * (x - mean(x)) / sqrt(variance(x) + eps) + bias, bias 0: none; out may be x."""
    whole = features - features % LANES
    rest = features - whole
    sums, squares = splat(np.float32(0.0)), splat(np.float32(0.0))
    for i in range(0, whole, LANES):
        sums = add(sums, load(x, i))
    if rest:
        sums = add(sums, load_part(x, whole, rest))
    mean = np.float32(total(sums) / features)
    lowered = splat(-mean)
    for i in range(0, whole, LANES):
        value = add(load(x, i), lowered)
        squares = fma(value, value, squares)
    last = np.float32(0.0)  # number by number: what a vector has beyond a part of it is zero, and not the mean
    for i in range(whole, features):
        last += (load_scalar(x, i) - mean) * (load_scalar(x, i) - mean)
    factor = splat(np.float32(1.0 / math.sqrt((total(squares) + last) / features + eps)))
    for i in range(0, whole, LANES):
        value = times(load(weight, i), times(add(load(x, i), lowered), factor))
        store(out, i, add(value, load(bias, i)) if bias else value)
    if rest:
        value = times(load_part(weight, whole, rest), times(add(load_part(x, whole, rest), lowered), factor))
        store_part(out, whole, add(value, load_part(bias, whole, rest)) if bias else value, rest)


@njit(nogil=True)
def rotate_neighbours(head: int, cos: int, sin: int, rotary_dim: int) -> None:
    """As `rotate`, of dimensions that are paired as GLM does it: (2 i, 2 i + 1). cos, sin are the same tables."""
    for i in range(rotary_dim // 2):
        a, b = load_scalar(head, 2 * i), load_scalar(head, 2 * i + 1)
        c, s = load_scalar(cos, i), load_scalar(sin, i)
        store_scalar(head, 2 * i, a * c - b * s)
        store_scalar(head, 2 * i + 1, b * c + a * s)


@njit(nogil=True)
def rotate(head: int, cos: int, sin: int, rotary_dim: int) -> None:
    """Rotary embedding in place, as Llama pairs its dimensions: (i, i + rotary_dim / 2). cos, sin [rotary_dim]."""
    half = rotary_dim // 2
    whole = half - half % LANES
    for i in range(0, whole, LANES):
        a, b = load(head, i), load(head, half + i)
        minus_b = times(b, splat(np.float32(-1.0)))
        store(head, i, add(times(a, load(cos, i)), times(minus_b, load(sin, i))))
        store(head, half + i, add(times(b, load(cos, half + i)), times(a, load(sin, half + i))))
    for i in range(whole, half, LANES):
        count = half - i
        a, b = load_part(head, i, count), load_part(head, half + i, count)
        minus_b = times(b, splat(np.float32(-1.0)))
        low = add(times(a, load_part(cos, i, count)), times(minus_b, load_part(sin, i, count)))
        high = add(times(b, load_part(cos, half + i, count)), times(a, load_part(sin, half + i, count)))
        store_part(head, i, low, count)
        store_part(head, half + i, high, count)


@njit(nogil=True)
def _activated(value: Any, activation: int) -> Any:
    """Of a vector, lane by lane."""
    if activation == GELU_TANH:
        return gelu_tanh(value)
    if activation == SQUARED_RELU:
        value = maximum(value, splat(np.float32(0.0)))
        return times(value, value)
    return silu(value)


@njit(nogil=True)
def gate(gates: int, ups: int, out: int, features: int, activation: int) -> None:
    """out = activation(gates) * ups; ups 0: of the gates alone."""
    whole = features - features % LANES
    for i in range(0, whole, LANES):
        value = _activated(load(gates, i), activation)
        store(out, i, times(value, load(ups, i)) if ups else value)
    if whole < features:
        rest = features - whole
        value = _activated(load_part(gates, whole, rest), activation)
        store_part(out, whole, times(value, load_part(ups, whole, rest)) if ups else value, rest)


@njit(nogil=True)
def scale_into(x: int, out: int, features: int, factor: float) -> None:
    """out = factor * x."""
    factors = splat(np.float32(factor))
    whole = features - features % LANES
    for i in range(0, whole, LANES):
        store(out, i, times(load(x, i), factors))
    if whole < features:
        rest = features - whole
        store_part(out, whole, times(load_part(x, whole, rest), factors), rest)


@njit(nogil=True)
def widen_into(storage: int, x: int, out: int, features: int, factor: float) -> None:
    """out = factor * x, of any storage; of 16 bits only whole vectors."""
    if storage == NATIVE:
        scale_into(x, out, features, factor)
        return
    factors = splat(np.float32(factor))
    for i in range(0, features, LANES):
        value = load_float16(x, i) if storage == FLOAT16 else load_bfloat16(x, i)
        store(out, i, times(value, factors))


@njit(nogil=True)
def add_scaled(x: int, out: int, features: int, factor: float) -> None:
    """out += factor * x."""
    factors = splat(np.float32(factor))
    whole = features - features % LANES
    for i in range(0, whole, LANES):
        store(out, i, fma(load(x, i), factors, load(out, i)))
    if whole < features:
        rest = features - whole
        store_part(out, whole, fma(load_part(x, whole, rest), factors, load_part(out, whole, rest)), rest)


@njit(nogil=True)
def scale_and_shift(x: int, gains: int, shifts: int, features: int) -> None:
    """x = gains * x + shifts."""
    whole = features - features % LANES
    for i in range(0, whole, LANES):
        store(x, i, fma(load(gains, i), load(x, i), load(shifts, i)))
    if whole < features:
        rest = features - whole
        value = fma(load_part(gains, whole, rest), load_part(x, whole, rest), load_part(shifts, whole, rest))
        store_part(x, whole, value, rest)


@njit(nogil=True)
def scatter(x: int, out: int, count: int, stride: int) -> None:
    """out[i * stride] = x[i]."""
    for i in range(count):
        store_scalar(out, i * stride, load_scalar(x, i))
