"""The two inner loops that all products share: four rows of weights against two tokens, eight sums in registers.

A caller with fewer rows or tokens left passes one twice and ignores the spare result, so every output element comes
from the same instructions in the same order whatever its neighbours are. Weights dominate the traffic of small batches,
so the spare arithmetic costs nothing where it happens. Addresses are integers; lengths are fp32 elements.
`ahead` is how far (in elements) the rows lie that are wanted next: fetched early, they came from memory at 17 GB/s per
core instead of 12 (Zen 4).
"""

# ruff: noqa: PLR0917  # Numba takes arguments by position

from __future__ import annotations

from numba import njit

from gralora_kernels.cpu.simd import LANES, fma, load, load_part, prefetch, splat, store, store_part, total

ROWS = 4
TOKENS = 2

Sums = tuple[float, float, float, float, float, float, float, float]


@njit(nogil=True)
def _prefetch_rows(w0: int, w1: int, w2: int, w3: int, offset: int) -> None:
    prefetch(w0, offset)
    prefetch(w1, offset)
    prefetch(w2, offset)
    prefetch(w3, offset)


@njit(nogil=True)
def dot(w0: int, w1: int, w2: int, w3: int, x0: int, x1: int, length: int, ahead: int) -> Sums:
    """Four weight rows times two tokens: (w0 x0, w1 x0, w2 x0, w3 x0, w0 x1, w1 x1, w2 x1, w3 x1)."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(0.0)
    whole = length - length % LANES
    for i in range(0, whole, LANES):
        p, q = load(x0, i), load(x1, i)
        _prefetch_rows(w0, w1, w2, w3, i + ahead)
        w = load(w0, i)
        a0, b0 = fma(w, p, a0), fma(w, q, b0)
        w = load(w1, i)
        a1, b1 = fma(w, p, a1), fma(w, q, b1)
        w = load(w2, i)
        a2, b2 = fma(w, p, a2), fma(w, q, b2)
        w = load(w3, i)
        a3, b3 = fma(w, p, a3), fma(w, q, b3)
    if whole < length:
        rest = length - whole
        p, q = load_part(x0, whole, rest), load_part(x1, whole, rest)
        w = load_part(w0, whole, rest)
        a0, b0 = fma(w, p, a0), fma(w, q, b0)
        w = load_part(w1, whole, rest)
        a1, b1 = fma(w, p, a1), fma(w, q, b1)
        w = load_part(w2, whole, rest)
        a2, b2 = fma(w, p, a2), fma(w, q, b2)
        w = load_part(w3, whole, rest)
        a3, b3 = fma(w, p, a3), fma(w, q, b3)
    return total(a0), total(a1), total(a2), total(a3), total(b0), total(b1), total(b2), total(b3)


@njit(nogil=True)
def add_scaled(y0: int, y1: int, w0: int, w1: int, w2: int, w3: int, factors: Sums, length: int, ahead: int) -> None:
    """Two tokens' outputs += four weight rows times a factor each (factors ordered as the result of `dot`)."""
    f0, f1, f2, f3 = splat(factors[0]), splat(factors[1]), splat(factors[2]), splat(factors[3])
    g0, g1, g2, g3 = splat(factors[4]), splat(factors[5]), splat(factors[6]), splat(factors[7])
    whole = length - length % LANES
    for i in range(0, whole, LANES):
        v0, v1, v2, v3 = load(w0, i), load(w1, i), load(w2, i), load(w3, i)
        a, b = load(y0, i), load(y1, i)
        _prefetch_rows(w0, w1, w2, w3, i + ahead)
        store(y0, i, fma(v3, f3, fma(v2, f2, fma(v1, f1, fma(v0, f0, a)))))
        store(y1, i, fma(v3, g3, fma(v2, g2, fma(v1, g1, fma(v0, g0, b)))))
    if whole < length:
        rest = length - whole
        v0, v1 = load_part(w0, whole, rest), load_part(w1, whole, rest)
        v2, v3 = load_part(w2, whole, rest), load_part(w3, whole, rest)
        a, b = load_part(y0, whole, rest), load_part(y1, whole, rest)
        store_part(y0, whole, fma(v3, f3, fma(v2, f2, fma(v1, f1, fma(v0, f0, a)))), rest)
        store_part(y1, whole, fma(v3, g3, fma(v2, g2, fma(v1, g1, fma(v0, g0, b)))), rest)
