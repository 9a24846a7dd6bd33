"""The two inner loops that all products share: four rows of weights against two tokens, eight sums in registers.

Rows and tokens that are left over are passed twice, and the second result ignored: every output element comes from the
same instructions in the same order, whichever neighbours it has. Weights dominate the traffic, so the spare arithmetic
costs nothing where it happens.
"""

from __future__ import annotations

from numba import njit

from gralora_kernels.cpu.simd import LANES, fma, load, load_part, load_scalar, splat, store, store_part, total

ROWS = 4
TOKENS = 2


@njit(nogil=True)
def _dot_step(w0, w1, w2, w3, x0, x1, sums):  # type: ignore[no-untyped-def]
    a0, a1, a2, a3, b0, b1, b2, b3 = sums
    a0, a1, a2, a3 = fma(w0, x0, a0), fma(w1, x0, a1), fma(w2, x0, a2), fma(w3, x0, a3)
    b0, b1, b2, b3 = fma(w0, x1, b0), fma(w1, x1, b1), fma(w2, x1, b2), fma(w3, x1, b3)
    return a0, a1, a2, a3, b0, b1, b2, b3
