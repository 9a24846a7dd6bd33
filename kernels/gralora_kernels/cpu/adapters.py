"""Shrink and expand for the adapters of a step, in pieces, and the "cpu" backend, which runs them layer by layer.

Adapters lie in panels (`packing.py`). A token's result does not depend on its batch (`microkernel.py`).
"""

# ruff: noqa: PLR0917  # Numba takes arguments by position

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from gralora_kernels.cpu.linear import FLOAT_BYTES, row_numbers
from gralora_kernels.cpu.microkernel import FROM_OUTPUT, FROM_ZERO, PANEL, multiply
from gralora_kernels.cpu.simd import load_int32, load_int64, load_scalar, store_scalar
from gralora_kernels.cpu.threads import region_lock
from gralora_kernels.grouping import TILE_TOKENS, Grouping
from gralora_kernels.tables import ENTRIES, GroupTable, ModuleTable

COLUMNS = 8 * PANEL  # of the output per piece of an expand
SCRATCH_BYTES = TILE_TOKENS * PANEL * FLOAT_BYTES  # that a shrink needs
# Below so many multiply-adds (an upper bound) one thread is done sooner than two have met: about 15 us on Zen 4.
SERIAL_WORK = 200_000


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
            weights = b + j * width * r + panel * r + inside - panel
            multiply(
                count, u + (column + j * r) * FLOAT_BYTES, u_stride, iota + first * 4, y + at * FLOAT_BYTES, y_stride,
                order + first * 4, arena + weights * FLOAT_BYTES, panel_columns, r, FROM_OUTPUT, columns,
                columns == PANEL,
            )  # fmt: skip
            at += columns
        column += r * k


# Two functions: Numba would join two loops of one length into one, and it cannot see that the second reads what the
# first writes.
@njit(nogil=True, parallel=True, cache=True)
def _shrink(
    parts: int, items: int, num_items: int, index: int, scales: int, x: int, in_features: int, order: int, u: int,
    u_stride: int, arena: int, scratch: int, iota: int,
) -> None:  # fmt: skip
    for part in prange(parts):
        own = scratch + part * SCRATCH_BYTES
        for i in range(part, num_items, parts):
            shrink_piece(items + 12 * i, index, scales, x, in_features, order, u, u_stride, arena, own, iota)


@njit(nogil=True, parallel=True, cache=True)
def _expand(
    parts: int, items: int, num_items: int, index: int, y: int, y_stride: int, out_features: int, order: int, u: int,
    u_stride: int, arena: int, iota: int,
) -> None:  # fmt: skip
    pieces = (out_features + COLUMNS - 1) // COLUMNS
    for part in prange(parts):
        for i in range(part, num_items * pieces, parts):
            item, begin = items + 12 * (i // pieces), i % pieces * COLUMNS
            expand_piece(item, index, begin, y, y_stride, out_features, order, u, u_stride, arena, iota)


class CpuBackend:
    """fp32 only. Holds the intermediate u, so calls take turns."""

    name = "cpu"
    panel = PANEL

    def __init__(self) -> None:
        self._u = torch.empty(0)
        self._scratch = torch.empty(0)
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
            work = grouping.num_adapted * grouping.max_width * (table.in_features + table.out_features)
            parts = 1 if work <= SERIAL_WORK else get_num_threads()
            self._reserve(grouping.num_adapted * grouping.max_width, parts)
            work_list = (parts, grouping.items.ctypes.data, grouping.num_items, table.host_index.ctypes.data)
            order, u, stride = grouping.order.ctypes.data, self._u.data_ptr(), grouping.max_width
            iota = row_numbers(grouping.num_tokens)
            _shrink(
                *work_list, table.host_scale.ctypes.data, x.data_ptr(), table.in_features, order, u, stride,
                arena.data_ptr(), self._scratch.data_ptr(), iota,
            )  # fmt: skip
            _expand(*work_list, y.data_ptr(), y.stride(0), table.out_features, order, u, stride, arena.data_ptr(), iota)

    def _reserve(self, numel: int, parts: int) -> None:
        if self._u.numel() < numel:
            self._u = torch.empty(numel)
        if self._scratch.numel() < parts * SCRATCH_BYTES // FLOAT_BYTES:
            self._scratch = torch.empty(parts * SCRATCH_BYTES // FLOAT_BYTES)


def _check(tensor: Tensor, shape: tuple[int, int]) -> None:
    """The kernel reads raw addresses: what it assumes about a tensor is checked here."""
    if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(
            f"the cpu backend needs contiguous float32 {shape}, got {tensor.dtype} {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )
