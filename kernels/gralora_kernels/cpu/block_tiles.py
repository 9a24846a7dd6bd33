"""A few rows times a panel of weights in blocks, which are widened in registers.

Sums are in the order of `microkernel`, so they are those of fp32.
"""

# ruff: noqa: ARG001, PLR0917  # Numba names an intrinsic's arguments, and takes arguments by position

# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from gralora_kernels.cpu.blocks import BLOCK, BLOCKS_4, BLOCKS_8, EIGHTS_BYTES, FOURS_BYTES, GROUP, PAIR
from gralora_kernels.cpu.microkernel import AHEAD, VECTORS, Tile, tile_rows
from gralora_kernels.cpu.separate import Separate
from gralora_kernels.cpu.simd import LANES, call, load_widened, splat_value
from gralora_kernels.cpu.variant import variant
from gralora_kernels.tables import Storage

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_INTEGERS = ir.VectorType(_I32, LANES)
_SUFFIX = f"v{LANES}f32"
# Rows of a tile, whose sums fit into registers beside scales and offsets: with half as many again they do not.
MOST_ROWS = 8 if LANES == 16 else 4
UNROLLED_ROWS = 4  # of a tile: with so few all steps of a group are one piece of code
STEPS = 2  # with more
BLOCK_BYTES = {BLOCKS_4: FOURS_BYTES, BLOCKS_8: EIGHTS_BYTES}  # of a pair


class _BlockTile(Tile):
    """Emits one tile: `rows` x VECTORS. w is a pair of panels, of which `column` is the first to be multiplied."""

    def __init__(self, builder: Any, args: Any, rows: int, kind: int) -> None:
        *operands, self.column, depth, start, columns = args
        zero = _I64(0)
        super().__init__(
            builder, [*operands, zero, depth, start, columns, zero, zero], rows, VECTORS, masked=False,
            storage=Storage.NATIVE,
        )  # fmt: skip
        self.kind = kind

    def _products(self, sums: list[Any], x_rows: list[Any]) -> list[Any]:
        return self._loop(sums, x_rows, _I64(0), self.depth, GROUP)

    def _steps(self, sums: list[Any], x_rows: list[Any], d: Any, count: int) -> list[Any]:
        if count < GROUP:
            return self._widening_steps(sums, x_rows, d, count)
        self._begin_group(d)
        if self.rows <= UNROLLED_ROWS:
            return self._widening_steps(sums, x_rows, d, count)
        return self._loop(sums, x_rows, d, self.builder.add(d, _I64(GROUP)), STEPS)

    def _begin_group(self, d: Any) -> None:
        b = self.builder
        group, row = b.udiv(d, _I64(GROUP)), b.urem(d, _I64(BLOCK))
        group_bytes = BLOCK_BYTES[self.kind] * GROUP // BLOCK
        self._fetch(b.add(self.w, b.add(b.mul(group, _I64(group_bytes)), _I64(AHEAD))), group_bytes)
        block = b.add(self.w, b.mul(b.udiv(d, _I64(BLOCK)), _I64(BLOCK_BYTES[self.kind])))
        self.scales = [self._float16(block, v) for v in range(VECTORS)]
        if self.kind == BLOCKS_4:  # a row of numbers of 32 bits for each group
            offsets = b.add(block, _I64(2 * PAIR))
            self.offsets = [self._float16(offsets, v) for v in range(VECTORS)]
            first = b.mul(b.add(b.mul(b.udiv(row, _I64(GROUP)), _I64(PAIR)), self.column), _I64(4))
            self.numbers = b.add(b.add(block, _I64(4 * PAIR)), first)
        else:
            self.numbers = b.add(b.add(block, _I64(2 * PAIR)), b.add(b.mul(row, _I64(PAIR)), self.column))

    def _widening_steps(self, sums: list[Any], x_rows: list[Any], d: Any, count: int) -> list[Any]:
        """`count` steps of a group, from d on."""
        b = self.builder
        of_group = b.urem(d, _I64(GROUP)) if count < GROUP else _I64(0)
        for step in range(count):
            b.fence("acq_rel", "singlethread")  # what is loaded for later steps would have no registers
            row = b.add(of_group, _I64(step))
            weights = [(self._four if self.kind == BLOCKS_4 else self._eight)(row, v) for v in range(VECTORS)]
            sums = self._multiply(sums, x_rows, b.add(d, _I64(step)), weights)
        return sums

    def _four(self, row: Any, v: int) -> Any:
        """One vector of a group's row: w = d * q + m."""
        b = self.builder
        bits = b.load(b.inttoptr(b.add(self.numbers, _I64(4 * v * LANES)), ir.PointerType(_INTEGERS)), align=4)
        shifted = b.lshr(bits, splat_value(b, b.trunc(b.mul(row, _I64(4)), _I32), _I32))
        number = b.sitofp(b.and_(shifted, ir.Constant(_INTEGERS, [15] * LANES)), _VECTOR)
        return call(b, f"llvm.fma.{_SUFFIX}", _VECTOR, [number, self.scales[v], self.offsets[v]])

    def _eight(self, row: Any, v: int) -> Any:
        """As `_four`: w = d * q."""
        b = self.builder
        at = b.add(self.numbers, b.add(b.mul(row, _I64(PAIR)), _I64(v * LANES)))
        number = b.sext(b.load(b.inttoptr(at, ir.PointerType(ir.VectorType(_I8, LANES))), align=1), _INTEGERS)
        return b.fmul(b.sitofp(number, _VECTOR), self.scales[v])

    def _float16(self, at: Any, v: int) -> Any:
        b = self.builder
        return load_widened(b, b.add(at, b.mul(b.add(self.column, _I64(v * LANES)), _I64(2))), bfloat16=False)


def _tile(rows: int, kind: int) -> Any:
    @intrinsic
    def tile(
        typing: Any, x: Any, x_stride: Any, x_index: Any, y: Any, y_stride: Any, y_index: Any, w: Any, column: Any,
        depth: Any, start: Any, columns: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _BlockTile(builder, args, rows, kind).emit()
            return context.get_dummy_value()

        return types.none(*(types.intp,) * 11), codegen

    return tile


def _multiplier(kind: int) -> Any:
    t1, t2, t3, t4 = (_tile(m, kind) for m in (1, 2, 3, 4))
    t6, t8 = (_tile(m, kind) if m <= MOST_ROWS else t4 for m in (6, 8))

    @njit(inline="always")
    @variant(kind)
    def multiply(
        rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, column: int,
        depth: int, start: int, columns: int,
    ) -> None:  # fmt: skip
        done = 0
        while done < rows:
            x_rows, y_rows, size = x_index + 4 * done, y_index + 4 * done, tile_rows(min(rows - done, MOST_ROWS))
            if size == 8:
                t8(x, x_stride, x_rows, y, y_stride, y_rows, w, column, depth, start, columns)
            elif size == 6:
                t6(x, x_stride, x_rows, y, y_stride, y_rows, w, column, depth, start, columns)
            elif size == 4:
                t4(x, x_stride, x_rows, y, y_stride, y_rows, w, column, depth, start, columns)
            elif size == 3:
                t3(x, x_stride, x_rows, y, y_stride, y_rows, w, column, depth, start, columns)
            elif size == 2:
                t2(x, x_stride, x_rows, y, y_stride, y_rows, w, column, depth, start, columns)
            else:
                t1(x, x_stride, x_rows, y, y_stride, y_rows, w, column, depth, start, columns)
            done += size

    return multiply


_multiply_fours, _multiply_eights = map(_multiplier, (BLOCKS_4, BLOCKS_8))


@Separate
def multiply_fours(
    rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, column: int,
    depth: int, start: int, columns: int,
) -> None:  # fmt: skip
    """Any number of rows times the panel that begins at a `column` of the pair w; see `microkernel`.

    It is widened anew for each tile: that pays for a few.
    """
    _multiply_fours(rows, x, x_stride, x_index, y, y_stride, y_index, w, column, depth, start, columns)


@Separate
def multiply_eights(
    rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, column: int,
    depth: int, start: int, columns: int,
) -> None:  # fmt: skip
    """As `multiply_fours`."""
    _multiply_eights(rows, x, x_stride, x_index, y, y_stride, y_index, w, column, depth, start, columns)
