"""A base linear layer: its weight in panels, and the product for any number of rows. Bit-identical for any batch."""

# ruff: noqa: PLR0917  # Numba takes arguments by position

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from gralora_kernels.cpu.microkernel import FROM_OUTPUT, FROM_ZERO, MAX_ROWS, PANEL, element_bytes_of, multiply_stored
from gralora_kernels.cpu.threads import region_lock
from gralora_kernels.tables import Storage

FLOAT_BYTES = 4
ROW_BLOCK = 8 * MAX_ROWS  # rows of one piece of work
DEPTH_BLOCK = 1024  # of a panel, which then stays in a second-level cache while the rows of a piece pass by

LEAST_ROW_NUMBERS = 1 << 12
SAMPLE = 16  # rows of a weight that show as a rule whether 16 bits hold it
DTYPES = {Storage.NATIVE: torch.float32, Storage.BFLOAT16: torch.bfloat16, Storage.FLOAT16: torch.float16}


def row_numbers(count: int) -> int:
    """Address of the int32 0 .. count: the index of a matrix whose rows lie in order. It stays valid."""
    return _row_numbers(max(LEAST_ROW_NUMBERS, 1 << (count - 1).bit_length())).ctypes.data


@cache
def _row_numbers(size: int) -> npt.NDArray[np.int32]:
    return np.arange(size, dtype=np.int32)


def storage_of(values: Tensor) -> Storage:
    """The smallest that holds all numbers of an fp32 matrix exactly."""
    return next((kind for kind in (Storage.BFLOAT16, Storage.FLOAT16) if _is_held(values, kind)), Storage.NATIVE)


def _is_held(values: Tensor, storage: Storage) -> bool:
    return all(torch.equal(part.to(DTYPES[storage]).float(), part) for part in (values[:SAMPLE], values[SAMPLE:]))


class PackedWeight:
    """A weight [out, in] as `panels [out / PANEL, in, PANEL]`, the last one padded with zeros.

    What 16 bits hold exactly is kept in 16 bits, and widened on its way to a register: half as much to read, and the
    products are those of fp32, bit for bit.
    """

    def __init__(self, weight: Tensor, *, as_saved: bool = True) -> None:
        """`as_saved` False: in fp32, whatever it holds."""
        self.out_features, self.in_features = weight.shape
        self.storage = storage_of(weight) if as_saved else Storage.NATIVE
        panels = -(-self.out_features // PANEL)
        self.panels = torch.zeros(panels, self.in_features, PANEL, dtype=DTYPES[self.storage])
        whole = self.out_features // PANEL
        split = weight[: whole * PANEL].reshape(whole, PANEL, self.in_features)
        self.panels[:whole].copy_(split.transpose(1, 2))
        if whole < panels:
            self.panels[whole, :, : self.out_features - whole * PANEL].copy_(weight[whole * PANEL :].t())

    @property
    def address(self) -> int:
        return self.panels.data_ptr()


@njit(nogil=True)
def num_pieces(rows: int, out_features: int) -> int:
    """Pieces of work of a product: a panel times up to ROW_BLOCK rows."""
    return (out_features + PANEL - 1) // PANEL * ((rows + ROW_BLOCK - 1) // ROW_BLOCK)


@njit(nogil=True)
def linear_piece(
    piece: int, rows: int, x: int, in_features: int, out: int, out_features: int, panels: int, storage: int, start: int,
    iota: int,
) -> None:  # fmt: skip
    """One piece of out [rows, out] = start + x [rows, in] @ weight.T; `start` as in `microkernel`."""
    blocks = (rows + ROW_BLOCK - 1) // ROW_BLOCK
    panel, first = piece // blocks, piece % blocks * ROW_BLOCK
    count = min(ROW_BLOCK, rows - first)
    column = panel * PANEL
    row_bytes = PANEL * element_bytes_of(storage)
    weight = panels + panel * in_features * row_bytes
    target = out + (first * out_features + column) * FLOAT_BYTES
    source = x + first * in_features * FLOAT_BYTES
    columns = min(PANEL, out_features - column)
    if start > FROM_OUTPUT:
        start += column * FLOAT_BYTES
    step = in_features if count <= MAX_ROWS else DEPTH_BLOCK
    for depth in range(0, in_features, step):
        multiply_stored(
            storage, count, source + depth * FLOAT_BYTES, in_features, iota, target, out_features, iota,
            weight + depth * row_bytes, PANEL, min(step, in_features - depth),
            start if depth == 0 else FROM_OUTPUT, columns, True,
        )  # fmt: skip


@njit(nogil=True, parallel=True, cache=True)
def _linear(
    parts: int, rows: int, x: int, in_features: int, out: int, out_features: int, panels: int, storage: int, start: int,
    iota: int,
) -> None:  # fmt: skip
    pieces = num_pieces(rows, out_features)
    for part in prange(parts):
        for piece in range(part * pieces // parts, (part + 1) * pieces // parts):
            linear_piece(piece, rows, x, in_features, out, out_features, panels, storage, start, iota)


def linear(out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    """out [tokens, out] = x [tokens, in] @ weight.T + bias, fp32 and contiguous throughout."""
    rows = x.numel() // weight.in_features
    tensors: tuple[Any, ...] = (out, x) if bias is None else (out, x, bias)
    if not all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors):
        raise ValueError("linear needs contiguous float32 tensors")
    if x.shape[-1] != weight.in_features or out.numel() != rows * weight.out_features:
        raise ValueError(
            f"x {tuple(x.shape)} and out {tuple(out.shape)} do not fit a weight "
            f"({weight.out_features}, {weight.in_features})"
        )
    start = FROM_ZERO if bias is None else bias.data_ptr()
    with region_lock:
        _linear(
            get_num_threads(), rows, x.data_ptr(), weight.in_features, out.data_ptr(), weight.out_features,
            weight.address, int(weight.storage), start, row_numbers(ROW_BLOCK),
        )  # fmt: skip
