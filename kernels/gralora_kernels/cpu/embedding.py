"""What adapters make of rows of an embedding: other rows in their place, and low-rank pairs that read a token's id.

Rare, and little beside a layer: one thread does it.
"""

# ruff: noqa: PLR0917  # Numba takes arguments by position

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from gralora_kernels.alignment import map_numel
from gralora_kernels.cpu.adapters import COLUMNS, expand_piece
from gralora_kernels.cpu.linear import FLOAT_BYTES, row_numbers
from gralora_kernels.cpu.microkernel import FROM_ZERO, PANEL, element_bytes_of, multiply_stored
from gralora_kernels.cpu.rows import scale_into
from gralora_kernels.cpu.separate import kernel
from gralora_kernels.cpu.simd import load_int32, load_int64, load_scalar, store_scalar
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import ENTRIES, GroupTable


def look_up(y: Tensor, ids: Tensor, arena: Tensor, group: GroupTable, grouping: Grouping, *, factor: float) -> None:
    """As `AdapterBackend.look_up`, fp32."""
    (module,) = group.modules
    scratch = torch.empty(1)
    u = torch.empty(grouping.num_adapted * grouping.max_width)
    no_gains = np.zeros(module.max_slots, np.int64)
    look_up_rows(
        grouping.num_items, grouping.items.ctypes.data, module.host_index.ctypes.data, module.host_scale.ctypes.data,
        module.host_storage.ctypes.data, module.host_affine.ctypes.data, no_gains.ctypes.data, ids.data_ptr(),
        module.in_features, y.data_ptr(), module.out_features, grouping.order.ctypes.data, u.data_ptr(),
        grouping.max_width, arena.data_ptr(), map_numel(module.in_features, FLOAT_BYTES), factor,
        scratch.data_ptr(), row_numbers(grouping.num_tokens),
    )  # fmt: skip


@kernel(f"void({', '.join(['int64'] * 16)}, float64, int64, int64)")
def look_up_rows(
    num_items: int, items: int, index: int, scales: int, storages: int, maps: int, no_gains: int, ids: int,
    in_features: int, y: int, out_features: int, order: int, u: int, u_stride: int, arena: int, rows_at: int,
    factor: float, scratch: int, iota: int,
) -> None:  # fmt: skip
    """`scratch`: one number's."""
    for i in range(num_items):
        item = items + 12 * i
        _put_rows(item, maps, ids, y, out_features, order, arena, rows_at, factor)
        _gather(item, index, scales, storages, ids, in_features, order, u, u_stride, arena, factor, scratch, iota)
        for begin in range(0, out_features, COLUMNS):
            expand_piece(
                item, index, storages, no_gains, begin, y, out_features, out_features, order, u, u_stride, arena, iota
            )


@njit(nogil=True)
def _put_rows(
    item: int, maps: int, ids: int, y: int, out_features: int, order: int, arena: int, rows_at: int, factor: float
) -> None:
    """y = factor * row, of an item's tokens that have one of their own."""
    slot, first, count = load_int32(item, 0), load_int32(item, 1), load_int32(item, 2)
    at = load_int64(maps, slot)
    if at == 0:
        return
    row_of = arena + (at - 1) * FLOAT_BYTES
    for t in range(first, first + count):
        token = load_int32(order, t)
        row = load_int32(row_of, load_int64(ids, token))
        if row:
            source = row_of + (rows_at + (row - 1) * out_features) * FLOAT_BYTES
            scale_into(source, y + token * out_features * FLOAT_BYTES, out_features, factor)


@njit(nogil=True)
def _gather(
    item: int, index: int, scales: int, storages: int, ids: int, in_features: int, order: int, u: int, u_stride: int,
    arena: int, factor: float, scratch: int, iota: int,
) -> None:  # fmt: skip
    """u = factor * scale * A's column of each token's id, of all entries: what a shrink is of one that is 1 and others
    that are 0. A lies in panels of its columns, and an embedding has no blocks."""
    slot, first, count = load_int32(item, 0), load_int32(item, 1), load_int32(item, 2)
    column = 0
    for entry in range(ENTRIES):
        at = slot * ENTRIES + entry
        a, r, storage = load_int64(index, at * 4), load_int64(index, at * 4 + 2), load_int64(storages, at)
        store_scalar(scratch, 0, np.float32(load_scalar(scales, at) * factor))
        for t in range(first, first + count):
            id_ = load_int64(ids, load_int32(order, t))
            for p in range(0, r, PANEL):
                columns = min(PANEL, r - p)
                source = arena + a * FLOAT_BYTES + (p * in_features + id_ * columns) * element_bytes_of(storage)
                target = u + (t * u_stride + column + p) * FLOAT_BYTES
                multiply_stored(
                    storage, 1, scratch, 1, iota, target, u_stride, iota, source, columns, 1, FROM_ZERO, columns,
                    columns == PANEL,
                )  # fmt: skip
        column += r
