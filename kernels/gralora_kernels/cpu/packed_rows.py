"""Rows of a packed weight, as they were, and their norms once a low-rank pair is added: what DoRA's magnitudes are of.

One thread and no lock of the interpreter's: it runs when an adapter is loaded, beside steps.
"""

# ruff: noqa: PLR0917  # Numba takes arguments by position

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from gralora_kernels.cpu.blocks import BLOCKS_4, widen_panel
from gralora_kernels.cpu.linear import FLOAT_BYTES, PackedWeight
from gralora_kernels.cpu.microkernel import PANEL, element_bytes_of
from gralora_kernels.cpu.rows import widen_into
from gralora_kernels.cpu.separate import kernel

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class PackedRows:
    """An embedding's rows in blocks of 8 bits, as `pack_rows` makes them."""

    def __init__(self, table: Tensor) -> None:
        """uint8 [rows, blocks, ROW_EIGHTS_BYTES]."""
        self._table = table

    def rows(self, first: int, count: int) -> Floats:
        """Rows from `first` on: [count, features]."""
        blocks = self._table[first : first + count]
        scales = blocks[..., :FLOAT_BYTES].contiguous().view(torch.float32)
        found: Floats = (scales * blocks[..., FLOAT_BYTES:].view(torch.int8)).view(len(blocks), -1).numpy()
        return found


def row_norms(weight: PackedWeight, first: int, a: Floats, b: Floats) -> Doubles:
    """Of `weight[first : first + out] + b @ a`, for a [r, in] and b [out, r]: [out]."""
    panel = first // PANEL
    before = first - panel * PANEL
    rows = before + len(b)
    padded = np.zeros((-(-rows // PANEL) * PANEL, b.shape[1]), np.float32)
    padded[before:rows] = b
    squares = np.zeros(len(padded))
    scratch = np.empty((weight.in_features, PANEL), np.float32)
    storage = int(weight.storage)
    columns = np.ascontiguousarray(padded.T)
    _add_squares(
        squares, panel, weight.address, storage, np.ascontiguousarray(a.T), columns, scratch, scratch.ctypes.data
    )
    return np.sqrt(squares[before:rows])


def rows_of(weight: PackedWeight, first: int, count: int) -> Floats:
    """`weight[first : first + count]`: [count, in]."""
    panel = first // PANEL
    panels = -(-(first + count) // PANEL) - panel
    scratch = np.empty((panels, weight.in_features, PANEL), np.float32)
    _widen_all(panel, panels, weight.address, int(weight.storage), weight.in_features, scratch.ctypes.data)
    before = first - panel * PANEL
    rows: Floats = np.ascontiguousarray(scratch.transpose(0, 2, 1).reshape(-1, weight.in_features)[before:][:count])
    return rows


@njit(nogil=True)
def _widen(panel: int, panels: int, storage: int, in_features: int, out: int) -> None:
    """fp32 [in, PANEL]."""
    if storage >= BLOCKS_4:
        widen_panel(storage, panels, in_features, panel, 0, in_features, out)
    else:
        numel = in_features * PANEL
        widen_into(storage, panels + panel * numel * element_bytes_of(storage), out, numel, 1.0)


@kernel("void(int64, int64, int64, int64, int64, int64)")
def _widen_all(first: int, count: int, panels: int, storage: int, in_features: int, out: int) -> None:
    for panel in range(count):
        _widen(first + panel, panels, storage, in_features, out + panel * in_features * PANEL * FLOAT_BYTES)


@kernel("void(float64[::1], int64, int64, int64, float32[:, ::1], float32[:, ::1], float32[:, ::1], int64)")
def _add_squares(
    squares: Doubles, first: int, panels: int, storage: int, a: Floats, b: Floats, scratch: Floats, scratch_at: int
) -> None:
    """a [in, r], b [r, rows of whole panels]."""
    in_features, r = a.shape
    for panel in range(len(squares) // PANEL):
        _widen(first + panel, panels, storage, in_features, scratch_at)
        for i in range(in_features):
            row = scratch[i]
            for q in range(r):
                factor = a[i, q]
                for c in range(PANEL):
                    row[c] += factor * b[q, panel * PANEL + c]
            for c in range(PANEL):
                squares[panel * PANEL + c] += np.float64(row[c]) * np.float64(row[c])
