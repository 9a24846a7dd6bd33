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

from gralora_kernels.cpu.block_tiles import multiply_eights, multiply_fours
from gralora_kernels.cpu.blocks import (
    BLOCK,
    BLOCKS_4,
    BLOCKS_8,
    PAIR,
    SAMPLE,
    block_bytes_of,
    multiply_row,
    pack_pairs,
    recognised,
    widen_panel,
)
from gralora_kernels.cpu.microkernel import (
    FROM_OUTPUT,
    FROM_ZERO,
    MAX_ROWS,
    PANEL,
    element_bytes_of,
    multiply_panel,
    multiply_panel_stored,
)
from gralora_kernels.cpu.separate import Separate, kernel
from gralora_kernels.cpu.simd import LANES
from gralora_kernels.cpu.threads import region_lock
from gralora_kernels.tables import Storage

FLOAT_BYTES = 4
ROW_BLOCK = 8 * MAX_ROWS  # rows of one piece of work,
ROW_BLOCK_OF_BLOCKS = 4 * ROW_BLOCK  # and where weights are widened for each
DEPTH_BLOCK = 1024  # of a panel, which then stays in a second-level cache while the rows of a piece pass by

LEAST_ROW_NUMBERS = 1 << 12
FP32_BITS = 32
FEW_ROWS = 16 if LANES == 16 else 8  # times a panel of blocks: so few have it widened for each tile of them
WIDE_ROWS = 256  # of depth that are widened at once: 16 KB with AVX2
WIDE_BYTES = WIDE_ROWS * PANEL * FLOAT_BYTES
# Between two threads' scratch. What hardware asks for behind a panel is otherwise what another thread writes: 16 rows
# of blocks took 1.1 to 1.7 times as long with less.
SCRATCH_GAP = 1 << 15
DTYPES: dict[int, torch.dtype] = {
    Storage.NATIVE: torch.float32,
    Storage.BFLOAT16: torch.bfloat16,
    Storage.FLOAT16: torch.float16,
    BLOCKS_4: torch.uint8,
    BLOCKS_8: torch.uint8,
}


def row_numbers(count: int) -> int:
    """Address of the int32 0 .. count: the index of a matrix whose rows lie in order. It stays valid."""
    return _row_numbers(max(LEAST_ROW_NUMBERS, 1 << (count - 1).bit_length())).ctypes.data


@cache
def _row_numbers(size: int) -> npt.NDArray[np.int32]:
    return np.arange(size, dtype=np.int32)


def storage_of(values: Tensor) -> Storage:
    """The smallest that holds all numbers of an fp32 matrix exactly, one by one."""
    return next((kind for kind in (Storage.BFLOAT16, Storage.FLOAT16) if _is_held(values, kind)), Storage.NATIVE)


def _is_held(values: Tensor, storage: Storage) -> bool:
    return all(torch.equal(part.to(DTYPES[storage]).float(), part) for part in (values[:SAMPLE], values[SAMPLE:]))


class PackedWeight:
    """A weight [out, in] in panels of PANEL columns, the last one filled up with zeros.

    What fewer bits hold exactly, 16 each or blocks of 4 or 8, is kept so, and widened on its way to a product: less to
    read, and the products are those of fp32, bit for bit.
    """

    def __init__(self, weight: Tensor, *, least_bits: int = FP32_BITS // 2) -> None:
        """`least_bits`: to keep a number in, 4, 16 or 32.

        Of blocks one row takes a quarter to half of the time of fp32, sixteen 0.8 to 1.06 of it.
        """
        self.out_features, self.in_features = weight.shape
        self.storage: int = storage_of(weight) if least_bits < FP32_BITS else Storage.NATIVE
        blocks = recognised(weight) if least_bits < FP32_BITS // 2 and self.storage == Storage.NATIVE else None
        if blocks is None:
            self.panels = _in_panels(weight.to(DTYPES[self.storage]))  # [panels, in, PANEL]
        else:
            self.storage, self.panels = blocks.kind, pack_pairs(blocks)

    @property
    def address(self) -> int:
        return self.panels.data_ptr()


def _in_panels(weight: Tensor) -> Tensor:
    out, width = weight.shape
    panels = weight.new_zeros(-(-out // PANEL), width, PANEL)
    whole = out // PANEL
    panels[:whole].copy_(weight[: whole * PANEL].reshape(whole, PANEL, width).transpose(1, 2))
    if out % PANEL:
        panels[whole, :, : out % PANEL].copy_(weight[whole * PANEL :].t())
    return panels


@njit(nogil=True)
def num_pieces(rows: int, out_features: int, storage: int) -> int:
    """Pieces of work of a product: some columns times up to ROW_BLOCK rows."""
    width: int = _piece_columns(rows, storage)
    blocks: int = _row_blocks(rows, storage)
    return (out_features + width - 1) // width * blocks


@njit(nogil=True)
def _row_block(storage: int) -> int:
    return ROW_BLOCK_OF_BLOCKS if storage >= BLOCKS_4 else ROW_BLOCK


@njit(nogil=True)
def _row_blocks(rows: int, storage: int) -> int:
    most: int = _row_block(storage)
    return (rows + most - 1) // most


@njit(nogil=True)
def _piece_columns(rows: int, storage: int) -> int:
    """A panel, but two of them if there is one row of blocks."""
    return PAIR if rows == 1 and storage >= BLOCKS_4 else PANEL


@Separate
def linear_piece(
    piece: int, rows: int, x: int, in_features: int, out: int, out_features: int, panels: int, storage: int, start: int,
    scratch: int, iota: int,
) -> None:  # fmt: skip
    """One piece of out [rows, out] = start + x [rows, in] @ weight.T; `start` as in `microkernel`. `scratch` has
    WIDE_BYTES.
    """
    blocks, most = _row_blocks(rows, storage), _row_block(storage)
    index, first = piece // blocks, piece % blocks * most
    count = min(most, rows - first)
    width = _piece_columns(rows, storage)
    column = index * width
    target = out + (first * out_features + column) * FLOAT_BYTES
    source = x + first * in_features * FLOAT_BYTES
    columns = min(width, out_features - column)
    if start > FROM_OUTPUT:
        start += column * FLOAT_BYTES
    if storage >= BLOCKS_4:
        if rows == 1:
            multiply_row(storage, source, in_features, target, panels, index, start, columns)
            return
        _multiply_blocks(
            storage, count, source, in_features, target, out_features, panels, index, start, columns, scratch, iota
        )
        return
    row_bytes = PANEL * element_bytes_of(storage)
    weight = panels + index * in_features * row_bytes
    step = in_features if count <= MAX_ROWS else DEPTH_BLOCK
    for depth in range(0, in_features, step):
        multiply_panel_stored(
            storage, count, source + depth * FLOAT_BYTES, in_features, iota, target, out_features, iota,
            weight + depth * row_bytes, min(step, in_features - depth), start if depth == 0 else FROM_OUTPUT, columns,
        )  # fmt: skip


@njit(nogil=True)
def _multiply_blocks(
    storage: int, count: int, source: int, in_features: int, target: int, out_features: int, weight: int, panel: int,
    start: int, columns: int, scratch: int, iota: int,
) -> None:  # fmt: skip
    """A panel of blocks. For many rows it is widened once, part by part, each then multiplied in the nearest cache."""
    if count <= FEW_ROWS:
        _multiply_blocks_for_few(
            storage, count, source, in_features, target, out_features, weight, panel, start, columns, iota
        )
        return
    for depth in range(0, in_features, WIDE_ROWS):
        wide = min(WIDE_ROWS, in_features - depth)
        widen_panel(storage, weight, in_features, panel, depth, wide, scratch)
        multiply_panel(
            count, source + depth * FLOAT_BYTES, in_features, iota, target, out_features, iota, scratch, wide,
            start if depth == 0 else FROM_OUTPUT, columns, 0,
        )  # fmt: skip


@njit(nogil=True)
def _multiply_blocks_for_few(
    storage: int, count: int, source: int, in_features: int, target: int, out_features: int, weight: int, panel: int,
    start: int, columns: int, iota: int,
) -> None:  # fmt: skip
    pair = weight + panel * PANEL // PAIR * (in_features // BLOCK) * block_bytes_of(storage)
    column = panel * PANEL % PAIR
    if storage == BLOCKS_4:
        multiply_fours(
            count, source, in_features, iota, target, out_features, iota, pair, column, in_features, start, columns
        )
    else:
        multiply_eights(
            count, source, in_features, iota, target, out_features, iota, pair, column, in_features, start, columns
        )


@kernel(f"void({', '.join(['int64'] * 11)})", parallel=True)
def _linear(
    parts: int, rows: int, x: int, in_features: int, out: int, out_features: int, panels: int, storage: int, start: int,
    scratch: int, iota: int,
) -> None:  # fmt: skip
    pieces = num_pieces(rows, out_features, storage)
    for part in prange(parts):
        for piece in range(part * pieces // parts, (part + 1) * pieces // parts):
            own = scratch + part * (WIDE_BYTES + SCRATCH_GAP)
            linear_piece(piece, rows, x, in_features, out, out_features, panels, storage, start, own, iota)


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
    parts = get_num_threads()
    scratch = torch.empty(parts * (WIDE_BYTES + SCRATCH_GAP), dtype=torch.uint8)  # at a multiple of a cache line
    with region_lock:
        _linear(
            parts, rows, x.data_ptr(), weight.in_features, out.data_ptr(), weight.out_features,
            weight.address, int(weight.storage), start, scratch.data_ptr(), row_numbers(ROW_BLOCK_OF_BLOCKS),
        )  # fmt: skip
