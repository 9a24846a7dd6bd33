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

from gralora_kernels.cpu.microkernel import AHEAD, FROM_OUTPUT, FROM_ZERO, PANEL, VECTORS
from gralora_kernels.cpu.simd import (
    LANES,
    fma,
    forget_loads,
    high_nibbles,
    load,
    load_float16,
    load_int8,
    load_part,
    load_scalar,
    low_nibbles,
    prefetch,
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
ROWS_AT_ONCE = 256  # that are looked at, so that what is computed on the way stays small
# Columns that lie side by side, two panels: an addition waits four cycles for the one before it, so one row is bound by
# its sums unless there are four vectors of them.
PAIR = 2 * PANEL
GROUP = 8  # numbers of 4 bits that share one of 32
FOURS_BYTES = PAIR * (2 + 2 + BLOCK // 2)  # of a pair's block: scales, offsets, two numbers a byte
EIGHTS_BYTES = PAIR * (2 + BLOCK)
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


def pack_pairs(blocks: Blocks) -> Tensor:
    """uint8 [pairs, in / 32, FOURS_BYTES or EIGHTS_BYTES], a pair's columns side by side, the last one filled up."""
    out = len(blocks.numbers)
    pairs = -(-out // PAIR)

    def by_pair(part: Tensor) -> Tensor:
        padded = part.new_zeros(pairs * PAIR, *part.shape[1:])
        padded[:out] = part
        return padded.view(pairs, PAIR, *part.shape[1:])

    def as_bytes(part: Tensor) -> Tensor:
        """[pairs, PAIR, blocks] -> [pairs, blocks, bytes]."""
        return by_pair(part).transpose(1, 2).contiguous().view(torch.uint8)

    numbers = by_pair(blocks.numbers)  # [pairs, PAIR, blocks, 32]
    if blocks.kind == BLOCKS_8:
        rows = numbers.permute(0, 2, 3, 1).contiguous().view(torch.uint8)
        return torch.cat([as_bytes(blocks.scales), rows.flatten(2)], dim=2)
    twos = numbers[..., 0::2] | (numbers[..., 1::2] << 4)
    groups = twos.reshape(*twos.shape[:3], BLOCK // GROUP, GROUP // 2).permute(0, 2, 3, 1, 4)
    return torch.cat([as_bytes(blocks.scales), as_bytes(blocks.offsets), groups.flatten(2)], dim=2)


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
    per_scale = (1 / d).masked_fill_(d == 0, 0.0)  # of a block that is all alike
    numbers = (blocks - m).mul_(per_scale).round_().clamp_(low, high)
    if not torch.equal((numbers * d).add_(m), blocks):  # none of what is no number is equal
        return None
    return Blocks(kind, scales, offsets, numbers.to(torch.int8 if kind == BLOCKS_8 else torch.uint8))


@njit(nogil=True)
def block_bytes_of(storage: int) -> int:
    return FOURS_BYTES if storage == BLOCKS_4 else EIGHTS_BYTES


@njit(nogil=True)
def widen_panel(storage: int, weight: int, in_features: int, panel: int, depth: int, wide: int, out: int) -> None:
    """A panel of a weight as fp32 [wide, PANEL], of its inputs from `depth` on. Both are of whole blocks."""
    size = block_bytes_of(storage)
    pair, column = panel * PANEL // PAIR, panel * PANEL % PAIR
    source = weight + (pair * in_features + depth) // BLOCK * size
    for b in range(wide // BLOCK):
        at, first = source + b * size, BLOCK * b * PANEL
        if storage == BLOCKS_4:
            _fetch_panel(at + wide // BLOCK * size, column)
        elif column == 0:
            _fetch(at + wide // BLOCK * size, size)
        for v in range(VECTORS):
            if storage == BLOCKS_4:
                _widen_fours(at, column + v * LANES, out, first + v * LANES)
            else:
                _widen_eights(at, column + v * LANES, out, first + v * LANES)


@njit(nogil=True)
def _widen_fours(at: int, column: int, out: int, first: int) -> None:
    """One vector of a block's columns."""
    d, sixteenth, m = _scales(at, column)
    for group in range(BLOCK // GROUP):
        bits = load(at + 4 * PAIR, group * PAIR + column)
        for byte in range(GROUP // 2):
            row = first + (GROUP * group + 2 * byte) * PANEL
            store(out, row, fma(low_nibbles(bits, byte), d, m))
            store(out, row + PANEL, fma(high_nibbles(bits, byte), sixteenth, m))


@njit(nogil=True)
def _scales(at: int, column: int) -> tuple[Any, Any, Any]:
    """Of one vector of a block of 4 bits: scales, a sixteenth of them, offsets. All are exact."""
    d = load_float16(at, column)
    return d, times(d, splat(np.float32(1 / 16))), load_float16(at, PAIR + column)


@njit(nogil=True)
def _widen_eights(at: int, column: int, out: int, first: int) -> None:
    d = load_float16(at, column)
    for row in range(BLOCK):
        store(out, first + row * PANEL, times(load_int8(at + 2 * PAIR, row * PAIR + column), d))


@njit(nogil=True)
def widen_row(x: int, out: int, features: int, factor: float) -> None:
    """out = factor * x, a row of `pack_rows`."""
    for b in range(features // BLOCK):
        at = x + b * ROW_EIGHTS_BYTES
        d, factors = splat(load_scalar(at, 0)), splat(factor)
        for i in range(0, BLOCK, LANES):
            store(out, b * BLOCK + i, times(times(load_int8(at + 4, i), d), factors))


@njit(nogil=True)
def multiply_row(
    storage: int, x: int, in_features: int, y: int, weight: int, pair: int, start: int, columns: int
) -> None:
    """y = start + x @ a pair of panels, for one row: widened in registers, added up in the order of `microkernel`."""
    a, b = _initial(start, y, 0, columns), _initial(start, y, LANES, columns)
    c, d = _initial(start, y, 2 * LANES, columns), _initial(start, y, 3 * LANES, columns)
    source = weight + pair * (in_features // BLOCK) * block_bytes_of(storage)
    for block in range(in_features // BLOCK):
        here = x + block * BLOCK * 4
        if storage == BLOCKS_4:
            a, b, c, d = _add_fours(here, source + block * FOURS_BYTES, a, b, c, d)
        else:
            a, b, c, d = _add_eights(here, source + block * EIGHTS_BYTES, a, b, c, d)
    _finish(y, 0, columns, a)
    _finish(y, LANES, columns, b)
    _finish(y, 2 * LANES, columns, c)
    _finish(y, 3 * LANES, columns, d)


@njit(nogil=True)
def _add_fours(x: int, at: int, a: Any, b: Any, c: Any, d: Any) -> tuple[Any, Any, Any, Any]:
    _fetch(at + AHEAD, FOURS_BYTES)
    p, q, r, s = _scales(at, 0), _scales(at, LANES), _scales(at, 2 * LANES), _scales(at, 3 * LANES)
    for group in range(BLOCK // GROUP):
        here, bits = x + group * GROUP * 4, at + 4 * PAIR + group * PAIR * 4
        a = _add_group(here, load(bits, 0), p, a)
        b = _add_group(here, load(bits, LANES), q, b)
        c = _add_group(here, load(bits, 2 * LANES), r, c)
        d = _add_group(here, load(bits, 3 * LANES), s, d)
    return a, b, c, d


@njit(nogil=True)
def _add_group(x: int, bits: Any, scales: tuple[Any, Any, Any], total: Any) -> Any:
    """One vector after the other, and x anew for each: AVX2's 16 registers do not hold it beside what all of them need
    (1.2 times as fast); the processor takes the next vector while this one's additions wait.
    """
    forget_loads()
    d, sixteenth, m = scales
    for byte in range(GROUP // 2):
        value, following = splat(load_scalar(x, 2 * byte)), splat(load_scalar(x, 2 * byte + 1))
        total = fma(value, fma(low_nibbles(bits, byte), d, m), total)
        total = fma(following, fma(high_nibbles(bits, byte), sixteenth, m), total)
    return total


@njit(nogil=True)
def _add_eights(x: int, at: int, a: Any, b: Any, c: Any, d: Any) -> tuple[Any, Any, Any, Any]:
    _fetch(at + AHEAD, EIGHTS_BYTES)
    p, q = load_float16(at, 0), load_float16(at, LANES)
    r, s = load_float16(at, 2 * LANES), load_float16(at, 3 * LANES)
    numbers = at + 2 * PAIR
    for row in range(BLOCK):
        value = splat(load_scalar(x, row))
        a = fma(value, times(load_int8(numbers, row * PAIR), p), a)
        b = fma(value, times(load_int8(numbers, row * PAIR + LANES), q), b)
        c = fma(value, times(load_int8(numbers, row * PAIR + 2 * LANES), r), c)
        d = fma(value, times(load_int8(numbers, row * PAIR + 3 * LANES), s), d)
    return a, b, c, d


@njit(nogil=True)
def _fetch(at: int, size: int) -> None:
    for line in range(0, size, 64):
        prefetch(at + line, 0)


@njit(nogil=True)
def _fetch_panel(at: int, column: int) -> None:
    """What a block of 4 bits holds of one panel of its pair."""
    prefetch(at + 2 * column, 0)
    prefetch(at + 2 * (PAIR + column), 0)
    for group in range(BLOCK // GROUP):
        for line in range(0, 4 * PANEL, 64):
            prefetch(at + 4 * (PAIR + group * PAIR + column) + line, 0)


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
