"""Cuts matrices into panels as `packing.py` says, many in one call that keeps no interpreter lock.

An element is moved as its bits, 16 or 32. Without the sign, bits are ordered as the numbers that they stand for, and
NaN is above all: so the largest magnitude is found on the way.
"""

# ruff: noqa: ARG001  # Numba names the arguments of an intrinsic and of its code generator

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from gralora_kernels.cpu.linear import FLOAT_BYTES
from gralora_kernels.cpu.microkernel import PANEL
from gralora_kernels.cpu.separate import kernel
from gralora_kernels.cpu.simd import LANES, call, splat, vector
from gralora_kernels.cpu.variant import variant
from gralora_kernels.packing import Array, Place

VECTOR_BYTES = LANES * FLOAT_BYTES

# Numba knows no enumerations.
SOURCE, TARGET, BLOCKS, DEPTH, COLUMNS, IS_TRANSPOSED = map(int, Place)


def place_panels(out: Array, values: Array, places: Array) -> Array:
    """See `PlaceMany`."""
    magnitudes = np.empty(len(places), values.dtype)
    place = place_16_bits if values.itemsize == 2 else place_32_bits
    place(out, values, places, magnitudes)
    return magnitudes


def _move(builder: Any, kind: Any, target: Any, source: Any) -> Any:
    """From address to address. A tensor may begin at any byte of a file."""
    value = builder.load(builder.inttoptr(source, ir.PointerType(kind)), align=1)
    builder.store(value, builder.inttoptr(target, ir.PointerType(kind)), align=1)
    return value


def _larger(builder: Any, value: Any, unsigned: Any, than: Any) -> Any:
    magnitude = builder.and_(value, unsigned)
    return builder.select(builder.icmp_unsigned(">", magnitude, than), magnitude, than)


def _movers(bits: int) -> tuple[Any, Any, Any]:
    """Intrinsics that move elements from address to address, and keep the largest magnitudes that came by."""
    element = ir.IntType(bits)
    elements = ir.VectorType(element, 8 * VECTOR_BYTES // bits)
    unsigned = 2 ** (bits - 1) - 1

    @intrinsic
    def move_vector(typing: Any, target: Any, source: Any, largest: Any) -> Any:
        """A vector full of elements; `largest` is one of each lane."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = _move(builder, elements, *args[:2])
            mask = ir.Constant(elements, [unsigned] * elements.count)
            return builder.bitcast(_larger(builder, value, mask, builder.bitcast(args[2], elements)), args[2].type)

        return vector(types.intp, types.intp, vector), codegen

    @intrinsic
    def move_element(typing: Any, target: Any, source: Any, largest: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.zext(_move(builder, element, *args[:2]), args[2].type)
            return _larger(builder, value, ir.Constant(args[2].type, unsigned), args[2])

        return types.intp(types.intp, types.intp, types.intp), codegen

    @intrinsic
    def largest_lane(typing: Any, largest: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            name = f"llvm.vector.reduce.umax.v{elements.count}i{bits}"
            return builder.zext(call(builder, name, element, [builder.bitcast(args[0], elements)]), ir.IntType(64))

        return types.intp(vector), codegen

    return move_vector, move_element, largest_lane


def _cutters(bits: int) -> tuple[Any, Any]:
    """Kernels that cut one block into panels, and return its largest magnitude."""
    size = bits // 8  # bytes of an element
    move_vector, move_element, largest_lane = _movers(bits)

    @njit(nogil=True)
    @variant(bits)
    def cut(out: int, block: int, depth: int, columns: int) -> Any:
        """block [depth, columns]"""
        lanes, largest = splat(np.float32(0.0)), 0
        if columns <= PANEL:  # one panel, which lies there as it is to lie here
            depth, columns = 1, depth * columns
        for start in range(0, columns, PANEL):
            width = min(PANEL, columns - start) * size
            for row in range(depth):
                source = block + (row * columns + start) * size
                done = 0
                while done + VECTOR_BYTES <= width:
                    lanes = move_vector(out + done, source + done, lanes)
                    done += VECTOR_BYTES
                while done < width:
                    largest = move_element(out + done, source + done, largest)
                    done += size
                out += width
        return max(largest, largest_lane(lanes))

    @njit(nogil=True)
    @variant(bits)
    def cut_transposed(out: int, block: int, depth: int, columns: int) -> int:
        """block [columns, depth]"""
        largest = 0
        for start in range(0, columns, PANEL):
            for row in range(depth):
                for column in range(start, min(start + PANEL, columns)):
                    largest = move_element(out, block + (column * depth + row) * size, largest)
                    out += size
        return largest

    return cut, cut_transposed


def _placer(bits: int) -> Any:
    size = bits // 8
    cut, cut_transposed = _cutters(bits)

    @njit(inline="always")
    @variant(bits)
    def place(out: Array, values: Array, places: Array, magnitudes: Array) -> None:
        for i in range(len(places)):
            blocks, depth, columns = places[i, BLOCKS], places[i, DEPTH], places[i, COLUMNS]
            room = min(len(values) - places[i, SOURCE], len(out) - places[i, TARGET])
            assert min(places[i, SOURCE], places[i, TARGET]) >= 0 <= blocks * depth * columns <= room
            source = values.ctypes.data + places[i, SOURCE] * size
            target = out.ctypes.data + places[i, TARGET] * size
            largest = 0
            for _ in range(blocks):
                if places[i, IS_TRANSPOSED]:
                    found = cut_transposed(target, source, depth, columns)
                else:
                    found = cut(target, source, depth, columns)
                largest = max(largest, found)
                source += depth * columns * size
                target += depth * columns * size
            magnitudes[i] = largest

    return place


_place_halves, _place_wholes = _placer(16), _placer(32)


# Not the factory's own functions: Numba does not find those in its cache, and compiled them at each start.
@kernel("void(uint16[::1], uint16[::1], int64[:, ::1], uint16[::1])")
def place_16_bits(out: Array, values: Array, places: Array, magnitudes: Array) -> None:
    _place_halves(out, values, places, magnitudes)


@kernel("void(uint32[::1], uint32[::1], int64[:, ::1], uint32[::1])")
def place_32_bits(out: Array, values: Array, places: Array, magnitudes: Array) -> None:
    _place_wholes(out, values, places, magnitudes)
