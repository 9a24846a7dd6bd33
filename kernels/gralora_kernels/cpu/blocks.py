"""Weights in blocks of 32 along their rows, as GGUF has them: recognised in fp32 numbers, packed, and widened again.

Of each block a scale, and of those of 4 bits an offset, are kept in 16 bits: w = d * q, or w = d * q + m. A product of
16 bits and 8 is exact in fp32, so a fused multiply-add gives the very number that whoever widened the file had. What is
not, number for number, of such a form is not taken for it.
"""

# ruff: noqa: PLR0917  # Numba takes arguments by position

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from gralora_kernels.cpu.microkernel import FROM_OUTPUT, FROM_ZERO, PANEL, VECTORS
from gralora_kernels.cpu.simd import (
    LANES,
    fma,
    load,
    load_float16,
    load_high_nibbles,
    load_int8,
    load_low_nibbles,
    load_part,
    load_scalar,
    splat,
    store,
    store_part,
)
from gralora_kernels.cpu.simd import (
    multiply as times,
)
from gralora_kernels.tables import Storage

BLOCK = 32  # numbers of a row that share a scale
BLOCKS_4 = len(Storage)  # kinds of storage that only base weights have: GGUF's Q4_1 and Q4_0,
BLOCKS_8 = BLOCKS_4 + 1  # and Q8_0

SAMPLE = 16  # rows that show as a rule whether all are of a form
ROWS_AT_ONCE = 2048  # that are looked at, so that what is computed on the way stays small
FOURS_BYTES = PANEL * (2 + 2 + BLOCK // 2)  # of a panel's block: scales, offsets, two numbers a byte
EIGHTS_BYTES = PANEL * (2 + BLOCK)
ROW_EIGHTS_BYTES = 4 + BLOCK  # of a row's block: a scale of fp32, and its numbers


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight [out, in] in parts. `kind`: BLOCKS_4 or BLOCKS_8, which has no offsets."""

    kind: int
    scales: Tensor  # float16 [out, in / 32]
    offsets: Tensor  # float16 [out, in / 32]
    numbers: Tensor  # uint8 or int8 [out, in / 32, 32]


def recognised(weight: Tensor) -> Blocks | None:
    """fp32 [out, in] in blocks, if all of it is of one form."""
    if weight.shape[1] % BLOCK:
        return None
    for form in (_in_eights, _in_fours_with_offsets, _in_fours):
        if form(_split(weight[:SAMPLE])) is not None:
            found = [form(_split(part)) for part in torch.split(weight, ROWS_AT_ONCE)]
            whole = [one for one in found if one is not None]
            if len(whole) == len(found):
                return Blocks(
                    whole[0].kind,
                    torch.cat([one.scales for one in whole]),
                    torch.cat([one.offsets for one in whole]),
                    torch.cat([one.numbers for one in whole]),
                )
    return None


def pack_panels(blocks: Blocks) -> Tensor:
    """uint8 [panels, in / 32, FOURS_BYTES or EIGHTS_BYTES], a panel's columns side by side, the last one filled up."""
    out = len(blocks.numbers)
    panels = -(-out // PANEL)

    def by_panel(part: Tensor) -> Tensor:
        padded = part.new_zeros(panels * PANEL, *part.shape[1:])
        padded[:out] = part
        return padded.view(panels, PANEL, *part.shape[1:])

    def as_bytes(part: Tensor) -> Tensor:
        """[panels, PANEL, blocks] -> [panels, blocks, bytes]."""
        return by_panel(part).transpose(1, 2).contiguous().view(torch.uint8)

    numbers = by_panel(blocks.numbers).permute(0, 2, 3, 1)  # [panels, blocks, 32, PANEL]
    if blocks.kind == BLOCKS_8:
        parts = [as_bytes(blocks.scales), numbers.contiguous().view(torch.uint8).flatten(2)]
    else:
        pairs = numbers[:, :, 0::2] | (numbers[:, :, 1::2] << 4)
        parts = [as_bytes(blocks.scales), as_bytes(blocks.offsets), pairs.flatten(2)]
    return torch.cat(parts, dim=2).contiguous()


def pack_rows(blocks: Blocks) -> Tensor:
    """uint8 [out, in / 32, ROW_EIGHTS_BYTES], each row from front to back. Of BLOCKS_8 only."""
    assert blocks.kind == BLOCKS_8, blocks.kind
    scales = blocks.scales.float()[..., None].view(torch.uint8)
    return torch.cat([scales, blocks.numbers.view(torch.uint8)], dim=2).contiguous()


def _split(weight: Tensor) -> Tensor:
    return weight.reshape(len(weight), -1, BLOCK)


def _in_eights(blocks: Tensor) -> Blocks | None:
    """The largest number of a block is 127 or -127 times its scale."""
    scales = (blocks.abs().amax(-1) / 127).half()
    return _exact(BLOCKS_8, blocks, scales, torch.zeros_like(scales), low=-127)


def _in_fours_with_offsets(blocks: Tensor) -> Blocks | None:
    """The least number of a block is its offset, and the largest 15 scales above."""
    low, high = blocks.amin(-1), blocks.amax(-1)
    return _exact(BLOCKS_4, blocks, ((high - low) / 15).half(), low.half(), high=15)


def _in_fours(blocks: Tensor) -> Blocks | None:
    """The largest number of a block, whatever its sign, is -8 times its scale, which may be negative."""
    low, high = blocks.amin(-1), blocks.amax(-1)
    scales = (torch.where(high > -low, high, low) / -8).half()
    return _exact(BLOCKS_4, blocks, scales, scales * -8, high=15)


def _exact(
    kind: int, blocks: Tensor, scales: Tensor, offsets: Tensor, *, low: int = 0, high: int = 127
) -> Blocks | None:
    """With these scales and offsets; None if a number is not what they make of a whole number from low to high."""
    d, m = scales.float()[..., None], offsets.float()[..., None]
    numbers = ((blocks - m) / d).nan_to_num(0.0, 0.0, 0.0).round_().clamp_(low, high)
    if not torch.equal(numbers * d + m, blocks):
        return None
    return Blocks(kind, scales, offsets, numbers.to(torch.int8 if kind == BLOCKS_8 else torch.uint8))


@njit(nogil=True)
def block_bytes(storage: int) -> int:
    """Of a panel's block."""
    return FOURS_BYTES if storage == BLOCKS_4 else EIGHTS_BYTES


@njit(nogil=True)
def widen_panel(storage: int, source: int, blocks: int, out: int) -> None:
    """`blocks` blocks of a panel, from `source` on, to fp32 [32 * blocks, PANEL]."""
    size = block_bytes(storage)
    for b in range(blocks):
        at, first = source + b * size, BLOCK * b * PANEL
        if storage == BLOCKS_4:
            _widen_fours(at, out, first)
        else:
            _widen_eights(at, out, first)


@njit(nogil=True)
def _widen_fours(at: int, out: int, first: int) -> None:
    numbers = at + 4 * PANEL
    for v in range(VECTORS):
        column = v * LANES
        d, m = load_float16(at, column), load_float16(at, PANEL + column)
        for pair in range(BLOCK // 2):
            row = first + 2 * pair * PANEL + column
            store(out, row, fma(load_low_nibbles(numbers, pair * PANEL + column), d, m))
            store(out, row + PANEL, fma(load_high_nibbles(numbers, pair * PANEL + column), d, m))


@njit(nogil=True)
def _widen_eights(at: int, out: int, first: int) -> None:
    numbers = at + 2 * PANEL
    for v in range(VECTORS):
        column = v * LANES
        d = load_float16(at, column)
        for row in range(BLOCK):
            store(out, first + row * PANEL + column, times(load_int8(numbers, row * PANEL + column), d))


@njit(nogil=True)
def widen_row(x: int, out: int, features: int, factor: float) -> None:
    """out = factor * x, a row of `pack_rows`."""
    for b in range(features // BLOCK):
        at = x + b * ROW_EIGHTS_BYTES
        d, factors = splat(load_scalar(at, 0)), splat(factor)
        for i in range(0, BLOCK, LANES):
            store(out, b * BLOCK + i, times(times(load_int8(at + 4, i), d), factors))


@njit(nogil=True)
def multiply_row(storage: int, x: int, y: int, source: int, blocks: int, start: int, columns: int) -> None:
    """y = start + x @ a panel, for one row: widened in registers, and added up in the order of `microkernel`."""
    a, b = _initial(start, y, 0, columns), _initial(start, y, LANES, columns)
    for block in range(blocks):
        if storage == BLOCKS_4:
            a, b = _add_fours(x, BLOCK * block, source + block * FOURS_BYTES, a, b)
        else:
            a, b = _add_eights(x, BLOCK * block, source + block * EIGHTS_BYTES, a, b)
    _finish(y, 0, columns, a)
    _finish(y, LANES, columns, b)


@njit(nogil=True)
def _add_fours(x: int, first: int, at: int, a: Any, b: Any) -> tuple[Any, Any]:
    d, e = load_float16(at, 0), load_float16(at, LANES)
    m, n = load_float16(at, PANEL), load_float16(at, PANEL + LANES)
    numbers = at + 4 * PANEL
    for pair in range(BLOCK // 2):
        here = pair * PANEL
        value, following = splat(load_scalar(x, first + 2 * pair)), splat(load_scalar(x, first + 2 * pair + 1))
        a = fma(value, fma(load_low_nibbles(numbers, here), d, m), a)
        b = fma(value, fma(load_low_nibbles(numbers, here + LANES), e, n), b)
        a = fma(following, fma(load_high_nibbles(numbers, here), d, m), a)
        b = fma(following, fma(load_high_nibbles(numbers, here + LANES), e, n), b)
    return a, b


@njit(nogil=True)
def _add_eights(x: int, first: int, at: int, a: Any, b: Any) -> tuple[Any, Any]:
    d, e = load_float16(at, 0), load_float16(at, LANES)
    numbers = at + 2 * PANEL
    for row in range(BLOCK):
        value = splat(load_scalar(x, first + row))
        a = fma(value, times(load_int8(numbers, row * PANEL), d), a)
        b = fma(value, times(load_int8(numbers, row * PANEL + LANES), e), b)
    return a, b


@njit(nogil=True)
def _initial(start: int, y: int, column: int, columns: int) -> Any:
    """One vector of what the sums begin at."""
    if start == FROM_ZERO:
        return splat(np.float32(0.0))
    address = y if start == FROM_OUTPUT else start
    if columns - column >= LANES:
        return load(address, column)
    return load_part(address, column, max(columns - column, 0))


@njit(nogil=True)
def _finish(y: int, column: int, columns: int, value: Any) -> None:
    if columns - column >= LANES:
        store(y, column, value)
    elif columns > column:
        store_part(y, column, value, columns - column)
