"""Shrink and expand for the adapters of a step, in pieces of work.

Adapters lie in panels (`packing.py`). A token's result does not depend on its batch (`microkernel.py`).
"""

# ruff: noqa: PLR0917  # Numba takes arguments by position

from __future__ import annotations

from typing import Any

from numba import njit

from gralora_kernels.cpu.linear import FLOAT_BYTES
from gralora_kernels.cpu.microkernel import (
    AHEAD,
    BFLOAT16,
    FETCHES,
    FLOAT16,
    FROM_OUTPUT,
    FROM_ZERO,
    NATIVE,
    PANEL,
    add_panels_bfloat16,
    add_panels_float16,
    add_panels_native,
    element_bytes_of,
    multiply_stored,
)
from gralora_kernels.cpu.rows import add_scaled, scale_and_shift, scale_into
from gralora_kernels.cpu.separate import Separate
from gralora_kernels.cpu.simd import (
    LANES,
    fma,
    load,
    load_bfloat16,
    load_float16,
    load_int32,
    load_int64,
    load_scalar,
    prefetch,
    splat,
    store,
    store_scalar,
)
from gralora_kernels.cpu.team import LINE
from gralora_kernels.cpu.variant import variant
from gralora_kernels.grouping import TILE_TOKENS
from gralora_kernels.tables import ENTRIES

COLUMNS = 384  # of the output per piece of an expand: whole panels, and few pieces
SCRATCH_BYTES = TILE_TOKENS * PANEL * FLOAT_BYTES  # that a shrink needs

FEW_TOKENS = 2  # of one adapter: so few are expanded one by one


def _expander(load_weights: Any, storage: int) -> Any:
    element_bytes = element_bytes_of.py_func(storage)
    lines = max(1, 2 * PANEL * element_bytes // LINE)  # of two panels, per row

    @njit(nogil=True)
    @variant(storage)
    def expand_token(panels: int, u: int, r: int, w: int, y: int) -> None:
        """y += u [r] @ w for whole panels that lie side by side: two at a time, for one waits for its own sums."""
        for p in range(0, panels - panels % 2, 2):
            first, second = p * r * PANEL, (p + 1) * r * PANEL
            ahead = w + first * element_bytes + AHEAD
            at = p * PANEL
            a, b, c, d = load(y, at), load(y, at + LANES), load(y, at + 2 * LANES), load(y, at + 3 * LANES)
            for row in range(r):
                value, shift = splat(load_scalar(u, row)), row * PANEL
                a = fma(value, load_weights(w, first + shift), a)
                b = fma(value, load_weights(w, first + shift + LANES), b)
                c = fma(value, load_weights(w, second + shift), c)
                d = fma(value, load_weights(w, second + shift + LANES), d)
                if FETCHES:
                    for line in range(lines):
                        prefetch(ahead + (row * lines + line) * LINE, 0)
            store(y, at, a)
            store(y, at + LANES, b)
            store(y, at + 2 * LANES, c)
            store(y, at + 3 * LANES, d)
        if panels % 2:
            first, at = (panels - 1) * r * PANEL, (panels - 1) * PANEL
            a, b = load(y, at), load(y, at + LANES)
            for row in range(r):
                value, shift = splat(load_scalar(u, row)), row * PANEL
                a = fma(value, load_weights(w, first + shift), a)
                b = fma(value, load_weights(w, first + shift + LANES), b)
            store(y, at, a)
            store(y, at + LANES, b)

    return expand_token


_expand_native, _expand_float16, _expand_bfloat16 = (
    _expander(load_weights, storage)
    for load_weights, storage in ((load, NATIVE), (load_float16, FLOAT16), (load_bfloat16, BFLOAT16))
)


@njit(inline="always")
def _expand_token(storage: int, panels: int, u: int, r: int, w: int, y: int) -> None:
    if storage == NATIVE:
        _expand_native(panels, u, r, w, y)
    elif storage == FLOAT16:
        _expand_float16(panels, u, r, w, y)
    else:
        _expand_bfloat16(panels, u, r, w, y)


@njit(inline="always")
def _add_panels(
    storage: int, rows: int, u: int, u_stride: int, u_rows: int, y: int, y_stride: int, y_rows: int, w: int, r: int,
    panels: int,
) -> None:  # fmt: skip
    if storage == NATIVE:
        add_panels_native(rows, u, u_stride, u_rows, y, y_stride, y_rows, w, r, panels)
    elif storage == FLOAT16:
        add_panels_float16(rows, u, u_stride, u_rows, y, y_stride, y_rows, w, r, panels)
    else:
        add_panels_bfloat16(rows, u, u_stride, u_rows, y, y_stride, y_rows, w, r, panels)


@Separate
def shrink_piece(
    item: int, index: int, scales: int, storages: int, x: int, in_features: int, order: int, u: int, u_stride: int,
    arena: int, scratch: int, iota: int,
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
        storage = load_int64(storages, slot * ENTRIES + entry)
        scale = load_scalar(scales, slot * ENTRIES + entry)
        for n in range(k):
            for p in range(0, r, PANEL):
                columns = min(PANEL, r - p)
                weights = arena + a * FLOAT_BYTES + (n * r + p) * width * element_bytes_of(storage)
                multiply_stored(
                    storage, count, x + n * width * FLOAT_BYTES, in_features, order + first * 4, scratch, PANEL, iota,
                    weights, columns, width, FROM_ZERO, columns, columns == PANEL,
                )  # fmt: skip
                for q in range(columns):
                    target = column + (p + q) // strip * r + n * strip + (p + q) % strip
                    for t in range(count):
                        store_scalar(u, (first + t) * u_stride + target, load_scalar(scratch, t * PANEL + q) * scale)
        column += r * k


@Separate
def expand_piece(
    item: int, index: int, storages: int, affines: int, begin: int, y: int, y_stride: int, out_features: int,
    order: int, u: int, u_stride: int, arena: int, iota: int,
) -> None:  # fmt: skip
    """y = gain * (y + u @ B) + shift of one item (slot, first, count), all its entries, for COLUMNS columns from
    `begin` on."""
    slot, first, count = load_int32(item, 0), load_int32(item, 1), load_int32(item, 2)
    end = min(begin + COLUMNS, out_features)
    column = 0
    for entry in range(ENTRIES):
        row = (slot * ENTRIES + entry) * 4
        b, r, k = load_int64(index, row + 1), load_int64(index, row + 2), load_int64(index, row + 3)
        if r == 0:
            continue
        width = out_features // k
        storage = load_int64(storages, slot * ENTRIES + entry)
        at = begin
        while at < end:  # the part of one block that lies between begin and end
            j = at // width
            columns = min((j + 1) * width, end) - at
            block = arena + b * FLOAT_BYTES + j * width * r * element_bytes_of(storage)
            source, target = u + (column + j * r) * FLOAT_BYTES, y + at * FLOAT_BYTES
            _expand_block(
                storage, count, source, u_stride, iota + first * 4, target, y_stride, order + first * 4, block, r,
                width, at - j * width, columns,
            )  # fmt: skip
            at += columns
        column += r * k
    affine = load_int64(affines, slot)
    if affine:
        gains = arena + (affine - 1 + begin) * FLOAT_BYTES
        for t in range(count):
            row = y + (load_int32(order, first + t) * y_stride + begin) * FLOAT_BYTES
            scale_and_shift(row, gains, gains + out_features * FLOAT_BYTES, end - begin)


@njit(nogil=True)
def set_aside_item(item: int, affines: int, y: int, kept: int, features: int, order: int) -> None:
    """kept = y, y = 0, of an item's tokens, if its slot has gains: they are for what comes now, not for what was."""
    slot, first, count = load_int32(item, 0), load_int32(item, 1), load_int32(item, 2)
    if load_int64(affines, slot):
        for t in range(count):
            shift = load_int32(order, first + t) * features * FLOAT_BYTES
            scale_into(y + shift, kept + shift, features, 1.0)
            scale_into(y + shift, y + shift, features, 0.0)


@njit(nogil=True)
def add_kept_item(item: int, affines: int, y: int, kept: int, features: int, order: int) -> None:
    """y += kept, of the same tokens."""
    slot, first, count = load_int32(item, 0), load_int32(item, 1), load_int32(item, 2)
    if load_int64(affines, slot):
        for t in range(count):
            shift = load_int32(order, first + t) * features * FLOAT_BYTES
            add_scaled(kept + shift, y + shift, features, 1.0)


@njit(nogil=True)
def _expand_block(
    storage: int, rows: int, u: int, u_stride: int, u_rows: int, y: int, y_stride: int, y_rows: int, block: int, r: int,
    width: int, inside: int, columns: int,
) -> None:  # fmt: skip
    """y += u @ B_j for `columns` columns of one block, from its column `inside` on; y begins there."""
    done = 0
    if inside % PANEL == 0 and columns >= PANEL:  # all whole panels
        done = columns - columns % PANEL
        weights = block + inside * r * element_bytes_of(storage)
        if rows > FEW_TOKENS:
            _add_panels(storage, rows, u, u_stride, u_rows, y, y_stride, y_rows, weights, r, done // PANEL)
        else:
            for t in range(rows):
                _expand_token(
                    storage, done // PANEL, u + load_int32(u_rows, t) * u_stride * FLOAT_BYTES, r, weights,
                    y + load_int32(y_rows, t) * y_stride * FLOAT_BYTES,
                )  # fmt: skip
    while done < columns:  # one panel, or a part of it
        panel = (inside + done) // PANEL * PANEL
        panel_columns = min(PANEL, width - panel)
        shift = inside + done - panel
        some = min(columns - done, panel_columns - shift)
        multiply_stored(
            storage, rows, u, u_stride, u_rows, y + done * FLOAT_BYTES, y_stride, y_rows,
            block + (panel * r + shift) * element_bytes_of(storage), panel_columns, r, FROM_OUTPUT, some, some == PANEL,
        )  # fmt: skip
        done += some
