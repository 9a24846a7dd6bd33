"""The "cpu" backend: shrink and expand for all adapters of a step, two parallel regions per linear layer.

Every element of u and y is summed by one thread in one fixed order, so a token's result does not depend on its batch.
"""

# ruff: noqa: PLR0917  # Numba takes arguments by position

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from gralora_kernels.cpu.simd import load_scalar, store_scalar
from gralora_kernels.cpu.threads import region_lock
from gralora_kernels.cpu.tiles import ROWS, TOKENS, add_scaled, dot
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import ENTRIES, GroupTable, ModuleTable

FLOAT_BYTES = 4
COLUMNS = 512  # of the output per piece of work: rank 16 keeps its slice of B in a 32 KB first-level cache
# Below so many multiply-adds (an upper bound) one thread is done sooner than two have met: about 15 us on Zen 4.
SERIAL_WORK = 200_000

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@njit(nogil=True)
def _shrink_rows(
    u: int, u_stride: int, x: int, in_features: int, order: Int32s, first: int, end: int,
    w: int, rows: int, width: int, scale: float, column: int, row: int, strip: int, rank: int, ahead: int,
) -> None:  # fmt: skip
    """u = scale * (up to four rows of Ap, one block wide) for one tile of tokens; `w` is where those rows begin.

    Row p = j*strip + c goes to column j*rank + c: the block exchange happens here, in the store.
    """
    stride = in_features * FLOAT_BYTES
    w1, w2, w3 = w + min(1, rows - 1) * stride, w + min(2, rows - 1) * stride, w + (rows - 1) * stride
    for i in range(first, end, TOKENS):
        other = min(i + 1, end - 1)
        sums = dot(w, w1, w2, w3, x + order[i] * stride, x + order[other] * stride, width, ahead)
        for lane in range(rows):
            target = column + (row + lane) // strip * rank + (row + lane) % strip
            store_scalar(u, i * u_stride + target, sums[lane] * scale)
            store_scalar(u, other * u_stride + target, sums[ROWS + lane] * scale)


@njit(nogil=True)
def _expand_columns(
    y: int, y_stride: int, out_features: int, u: int, u_stride: int, order: Int32s, first: int, end: int,
    b: int, rank: int, column: int, begin: int, length: int,
) -> None:  # fmt: skip
    """y[begin .. begin + length] += u[column .. column + rank] @ Bp[:, begin ..] for one tile of tokens."""
    stride = out_features * FLOAT_BYTES
    start = begin * FLOAT_BYTES
    zero = np.float32(0.0)
    for i in range(first, end, TOKENS):
        other = min(i + 1, end - 1)
        y0, y1 = y + order[i] * y_stride * FLOAT_BYTES + start, y + order[other] * y_stride * FLOAT_BYTES + start
        p, q = i * u_stride + column, other * u_stride + column
        for c in range(0, rank, ROWS):
            last = rank - 1 - c
            w = b + c * stride + start
            f1 = load_scalar(u, p + c + 1) if last >= 1 else zero
            f2 = load_scalar(u, p + c + 2) if last >= 2 else zero
            f3 = load_scalar(u, p + c + 3) if last >= 3 else zero
            g1 = load_scalar(u, q + c + 1) if last >= 1 else zero
            g2 = load_scalar(u, q + c + 2) if last >= 2 else zero
            g3 = load_scalar(u, q + c + 3) if last >= 3 else zero
            factors = (load_scalar(u, p + c), f1, f2, f3, load_scalar(u, q + c), g1, g2, g3)
            w1, w2, w3 = w + min(1, last) * stride, w + min(2, last) * stride, w + min(3, last) * stride
            add_scaled(y0, y1, w, w1, w2, w3, factors, length, ROWS * out_features)


@njit(nogil=True)
def _shrink(
    part: int, parts: int, u: int, u_stride: int, x: int, in_features: int, arena: int,
    index: Int64s, scale: Floats, order: Int32s, items: Int32s,
) -> None:  # fmt: skip
    """Every `parts`-th piece of the shrink: a piece is four rows of one block of one entry, for one tile of tokens."""
    piece = 0
    for item in range(items.shape[0]):
        slot, first = items[item, 0], items[item, 1]
        column = 0
        for entry in range(ENTRIES):
            rank, k = index[slot, entry, 2], index[slot, entry, 3]
            if rank == 0:
                continue
            width, strip = in_features // k, rank // k
            for row in range(0, rank, ROWS):
                for n in range(k):
                    if piece % parts == part:
                        w = arena + (index[slot, entry, 0] + row * in_features + n * width) * FLOAT_BYTES
                        _shrink_rows(
                            u, u_stride, x + n * width * FLOAT_BYTES, in_features, order, first, first + items[item, 2],
                            w, min(ROWS, rank - row), width, scale[slot, entry], column + n * strip, row, strip, rank,
                            ROWS * parts * in_features,
                        )  # fmt: skip
                    piece += 1
            column += rank * k


@njit(nogil=True)
def _expand(
    part: int, parts: int, y: int, y_stride: int, out_features: int, u: int, u_stride: int, arena: int,
    index: Int64s, order: Int32s, items: Int32s,
) -> None:  # fmt: skip
    """Every `parts`-th piece of the expand: a piece is some columns of the output, for one tile of tokens."""
    piece = 0
    for item in range(items.shape[0]):
        slot, first = items[item, 0], items[item, 1]
        for begin in range(0, out_features, COLUMNS):
            piece += 1
            if piece % parts != part:
                continue
            end = min(begin + COLUMNS, out_features)
            column = 0
            for entry in range(ENTRIES):
                rank, k = index[slot, entry, 2], index[slot, entry, 3]
                if rank == 0:
                    continue
                width = out_features // k
                for j in range(begin // width, (end - 1) // width + 1):
                    low, high = max(begin, j * width), min(end, (j + 1) * width)
                    _expand_columns(
                        y, y_stride, out_features, u, u_stride, order, first, first + items[item, 2],
                        arena + index[slot, entry, 1] * FLOAT_BYTES, rank, column + j * rank, low, high - low,
                    )  # fmt: skip
                column += rank * k


@njit(nogil=True, parallel=True, cache=True)
def _apply(
    parts: int, y: int, y_stride: int, out_features: int, x: int, in_features: int, arena: int, u: int, u_stride: int,
    index: Int64s, scale: Floats, order: Int32s, items: Int32s,
) -> None:  # fmt: skip
    for part in prange(parts):
        _shrink(part, parts, u, u_stride, x, in_features, arena, index, scale, order, items)
    for part in prange(parts):
        _expand(part, parts, y, y_stride, out_features, u, u_stride, arena, index, order, items)


@njit(nogil=True, cache=True)
def _apply_serially(
    parts: int, y: int, y_stride: int, out_features: int, x: int, in_features: int, arena: int, u: int, u_stride: int,
    index: Int64s, scale: Floats, order: Int32s, items: Int32s,
) -> None:  # fmt: skip
    for part in range(parts):
        _shrink(part, parts, u, u_stride, x, in_features, arena, index, scale, order, items)
    for part in range(parts):
        _expand(part, parts, y, y_stride, out_features, u, u_stride, arena, index, order, items)


class CpuBackend:
    """fp32 only. Holds the intermediate u, so calls take turns."""

    name = "cpu"

    def __init__(self) -> None:
        self._u = torch.empty(0)
        self._lock = threading.Lock()

    def prepare(self, groups: Sequence[GroupTable], grouping: Grouping) -> None:
        """The kernels read the grouping itself."""

    def apply(self, y: Tensor, x: Tensor, arena: Tensor, group: GroupTable, grouping: Grouping) -> None:
        """y [tokens, sum(out)] += adapter(x [tokens, in]) for the tokens that have an adapter."""
        if not grouping.num_adapted:
            return
        _check(y, (grouping.num_tokens, group.out_features))
        _check(x, (grouping.num_tokens, group.in_features))
        if arena.dtype != torch.float32:
            raise ValueError(f"the cpu backend needs a float32 arena, got {arena.dtype}")
        for table, start in zip(group.modules, group.column_starts, strict=True):
            columns = y[:, start : start + table.out_features]
            self._apply_module(columns, x, arena, table, grouping)

    def _apply_module(self, y: Tensor, x: Tensor, arena: Tensor, table: ModuleTable, grouping: Grouping) -> None:
        with self._lock, region_lock:
            if self._u.numel() < grouping.num_adapted * grouping.max_width:
                self._u = torch.empty(grouping.num_adapted * grouping.max_width)
            work = grouping.num_adapted * grouping.max_width * (table.in_features + table.out_features)
            parts = 1 if work <= SERIAL_WORK else get_num_threads()
            kernel = _apply_serially if parts == 1 else _apply
            kernel(
                parts, y.data_ptr(), y.stride(0), table.out_features, x.data_ptr(), table.in_features,
                arena.data_ptr(), self._u.data_ptr(), grouping.max_width, table.host_index, table.host_scale,
                grouping.order, grouping.items,
            )  # fmt: skip


def _check(tensor: Tensor, shape: tuple[int, int]) -> None:
    """The kernel reads raw addresses: what it assumes about a tensor is checked here."""
    if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(
            f"the cpu backend needs contiguous float32 {shape}, got {tensor.dtype} {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )
