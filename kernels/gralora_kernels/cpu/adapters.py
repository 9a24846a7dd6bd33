"""Shrink and expand for the adapters of a step, in pieces of work.

Adapters lie in panels (`packing.py`). A token's result does not depend on its batch (`microkernel.py`).
"""

# ruff: noqa: PLR0917  # Numba takes arguments by position

from __future__ import annotations

from numba import njit

from gralora_kernels.cpu.linear import FLOAT_BYTES
from gralora_kernels.cpu.microkernel import FROM_OUTPUT, FROM_ZERO, PANEL, multiply
from gralora_kernels.cpu.simd import load_int32, load_int64, load_scalar, store_scalar
from gralora_kernels.grouping import TILE_TOKENS
from gralora_kernels.tables import ENTRIES

COLUMNS = 8 * PANEL  # of the output per piece of an expand
SCRATCH_BYTES = TILE_TOKENS * PANEL * FLOAT_BYTES  # that a shrink needs


@njit(nogil=True)
def shrink_piece(
    item: int, index: int, scales: int, x: int, in_features: int, order: int, u: int, u_stride: int, arena: int,
    scratch: int, iota: int,
) -> None:  # fmt: skip
    """u = scale * x @ A of one item (slot, first, count), all its entries and blocks, already exchanged.

    Row p = j*strip + c of block n goes to column j*r + n*strip + c: the exchange happens here, in the store.
    """
    slot, first, count = load_int32(item, 0), load_int32(item, 1), load_int32(item, 2)
    column = 0
    for entry in range(ENTRIES):
        row = (slot * ENTRIES + entry) * 4
        a, r, k = load_int64(index, row), load_int64(index, row + 2), load_int64(index, row + 3)
        if r == 0:
            continue
        width, strip = in_features // k, r // k
        scale = load_scalar(scales, slot * ENTRIES + entry)
        for n in range(k):
            for p in range(0, r, PANEL):
                columns = min(PANEL, r - p)
                multiply(
                    count, x + n * width * FLOAT_BYTES, in_features, order + first * 4, scratch, PANEL, iota,
                    arena + (a + n * width * r + p * width) * FLOAT_BYTES, columns, width, FROM_ZERO, columns,
                    columns == PANEL,
                )  # fmt: skip
                for q in range(columns):
                    target = column + (p + q) // strip * r + n * strip + (p + q) % strip
                    for t in range(count):
                        store_scalar(u, (first + t) * u_stride + target, load_scalar(scratch, t * PANEL + q) * scale)
        column += r * k


@njit(nogil=True)
def expand_piece(
    item: int, index: int, begin: int, y: int, y_stride: int, out_features: int, order: int, u: int, u_stride: int,
    arena: int, iota: int,
) -> None:  # fmt: skip
    """y += u @ B of one item (slot, first, count), all its entries, for COLUMNS columns from `begin` on."""
    slot, first, count = load_int32(item, 0), load_int32(item, 1), load_int32(item, 2)
    end = min(begin + COLUMNS, out_features)
    column = 0
    for entry in range(ENTRIES):
        row = (slot * ENTRIES + entry) * 4
        b, r, k = load_int64(index, row + 1), load_int64(index, row + 2), load_int64(index, row + 3)
        if r == 0:
            continue
        width = out_features // k
        at = begin
        while at < end:  # one panel, or the part of it that lies between begin and end
            j = at // width
            inside = at - j * width
            panel = inside // PANEL * PANEL
            panel_columns = min(PANEL, width - panel)
            columns = min(panel + panel_columns - inside, end - at)
            weights = arena + (b + j * width * r + panel * r + inside - panel) * FLOAT_BYTES
            source, target = u + (column + j * r) * FLOAT_BYTES, y + at * FLOAT_BYTES
            multiply(
                count, source, u_stride, iota + first * 4, target, y_stride, order + first * 4, weights, panel_columns,
                r, FROM_OUTPUT, columns, columns == PANEL,
            )  # fmt: skip
            at += columns
        column += r * k
