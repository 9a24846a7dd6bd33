"""The product that everything on the CPU is made of: a few rows times a panel of columns, kept in registers.

    y[y_index[m], c] = start[m, c] + sum over d in 0 .. depth of x[x_index[m], d] * w[d, c]

`fetch` is an address to bring into the cache meanwhile, `fetch_step` how many bytes further at each step of depth.

Each element is one chain of fused multiply-adds over d, in order. So it does not depend on how rows, columns or depth
are cut into calls: that is what makes a token's result independent of its batch, bit for bit. Base products, adapters
and attention all go through here. Addresses are plain integers, strides are elements, nothing checks bounds.

x and y are fp32. w may be of 16 bits (`Storage`): each of its elements becomes fp32, exactly, on its way to a register.
"""

# ruff: noqa: ARG001, PLR0917  # Numba names an intrinsic's arguments, and takes arguments by position

# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from gralora_kernels.cpu.separate import Separate
from gralora_kernels.cpu.simd import LANES, ask_for, call, constant, load_widened, pointer_to, splat_value
from gralora_kernels.cpu.variant import variant
from gralora_kernels.tables import Storage

VECTORS = 2  # per row of a panel
PANEL = VECTORS * LANES  # columns
# Rows whose sums fit into registers: 24 of 32 with AVX-512, 12 of 16 with AVX2.
MAX_ROWS = 12 if LANES == 16 else 6
UNROLL = 4
# While a tile computes, it asks for a part of what lies behind the panel, which is the next one; so memory is read all
# the time and not only by the tile that comes first. Steps of 3 to 16 rows are 1.05 to 1.25 times as fast on Zen 3, and
# on Zen 5 those of 4 to 16 rows of 16 bits 1.4 to 1.6 times, of 16 rows of fp32 1.13 times.
FETCHING_ROWS = 3
# With fewer rows of an fp32 panel the processor's own prefetching is level (2) or better (1). Of 16 bits they compute
# for twice as long as they read: they ask for what lies so many bytes further on themselves (1.13 times as fast; 1, 2,
# 8 and 16 KB are level).
AHEAD = 4096
# Expands of adapters ask for the next panels too, but not with AVX-512, where they were 1.01 to 1.04 times as slow.
FETCHES = LANES == 8
LINE = 64  # bytes of the cache

NATIVE, FLOAT16, BFLOAT16 = map(int, Storage)  # Numba knows no enumerations

FROM_ZERO = 0  # `start`: sums begin at 0
FROM_OUTPUT = 1  # sums begin at what y holds; any other value is the address of a bias

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_F32 = ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_SUFFIX = f"v{LANES}f32"


def _element_bytes(storage: Storage) -> int:
    return 4 if storage is Storage.NATIVE else 2


class Tile:
    """Emits one tile: `rows` x `vectors`, columns beyond `columns` not written, nor read if `masked`."""

    fetches = True  # see FETCHING_ROWS

    def __init__(self, builder: Any, args: Any, rows: int, vectors: int, *, masked: bool, storage: Storage) -> None:
        self.builder = builder
        (self.x, self.x_stride, self.x_index, self.y, self.y_stride, self.y_index, self.w, self.w_stride, self.depth,
         self.start, self.columns, self.fetch, self.fetch_step) = args  # fmt: skip
        self.rows, self.vectors, self.masked, self.storage = rows, vectors, masked, storage

    def emit(self) -> None:
        self.masks = [self._mask(v) for v in range(self.vectors)]
        x_rows = [self._row(self.x, self.x_stride, self.x_index, m) for m in range(self.rows)]
        y_rows = [self._row(self.y, self.y_stride, self.y_index, m) for m in range(self.rows)]
        self._store(y_rows, self._products(self._initial(y_rows), x_rows))

    def _products(self, sums: list[Any], x_rows: list[Any]) -> list[Any]:
        """The sums, over all of depth."""
        whole = self.builder.and_(self.depth, _I64(-UNROLL))
        sums = self._loop(sums, x_rows, _I64(0), whole, UNROLL)
        return self._loop(sums, x_rows, whole, self.depth, 1)

    def _row(self, base: Any, stride: Any, index: Any, m: int) -> Any:
        b = self.builder
        address = b.inttoptr(b.add(index, _I64(4 * m)), ir.PointerType(_I32))
        row = b.sext(b.load(address, align=4), _I64)
        return b.add(base, b.shl(b.mul(row, stride), _I64(2)))

    def _mask(self, v: int) -> Any:
        b = self.builder
        lanes = ir.Constant(ir.VectorType(_I32, LANES), list(range(v * LANES, (v + 1) * LANES)))
        return b.icmp_signed("<", lanes, splat_value(b, b.trunc(self.columns, _I32), _I32))

    def _load(self, address: Any, v: int, masked: bool) -> Any:
        b = self.builder
        p = pointer_to(b, address, _I64(v * LANES))
        if not masked:
            return b.load(p, align=4)
        return call(b, f"llvm.masked.load.{_SUFFIX}.p0", _VECTOR, [p, _I32(4), self.masks[v], constant(0.0)])

    def _weights(self, d: Any, v: int) -> Any:
        """Vector v of row d of w, as fp32."""
        b = self.builder
        row = b.mul(d, self.w_stride)
        if self.storage is Storage.NATIVE:
            return self._load(b.add(self.w, b.shl(row, _I64(2))), v, self.masked)
        address = b.add(self.w, b.shl(b.add(row, _I64(v * LANES)), _I64(1)))
        return load_widened(b, address, bfloat16=self.storage is Storage.BFLOAT16)

    def _store(self, y_rows: list[Any], sums: list[Any]) -> None:
        """Without masks where all columns are wanted: AVX2 has masked stores, but each takes dozens of cycles."""
        b = self.builder
        is_whole = b.icmp_signed(">=", self.columns, _I64(self.vectors * LANES))
        with b.if_else(is_whole) as (whole, part):
            for masked, block in ((False, whole), (True, part)):
                with block:
                    for i, value in enumerate(sums):
                        self._store_vector(y_rows[i // self.vectors], i % self.vectors, value, masked)

    def _store_vector(self, address: Any, v: int, value: Any, masked: bool) -> None:
        b = self.builder
        p = pointer_to(b, address, _I64(v * LANES))
        if not masked:
            b.store(value, p, align=4)
            return
        call(b, f"llvm.masked.store.{_SUFFIX}.p0", ir.VoidType(), [value, p, _I32(4), self.masks[v]])

    def _initial(self, y_rows: list[Any]) -> list[Any]:
        """Zeros, y, or the bias in every row."""
        b = self.builder
        count = self.rows * self.vectors
        zero, output, bias, begin = (b.append_basic_block(n) for n in ("zero", "output", "bias", "begin"))
        switch = b.switch(self.start, bias)
        switch.add_case(_I64(FROM_ZERO), zero)
        switch.add_case(_I64(FROM_OUTPUT), output)
        choices = []
        for block, values in (
            (zero, lambda: [constant(0.0)] * count),
            (output, lambda: [self._load(y, v, True) for y in y_rows for v in range(self.vectors)]),
            (bias, lambda: [self._load(self.start, v, True) for v in range(self.vectors)] * self.rows),
        ):
            b.position_at_end(block)
            choices.append((block, values()))
            b.branch(begin)
        b.position_at_end(begin)
        return self._phis(choices, count)

    def _phis(self, choices: list[tuple[Any, list[Any]]], count: int) -> list[Any]:
        phis = [self.builder.phi(_VECTOR) for _ in range(count)]
        for block, values in choices:
            for phi, value in zip(phis, values, strict=True):
                phi.add_incoming(value, block)
        return phis

    def _loop(self, sums: list[Any], x_rows: list[Any], begin: Any, end: Any, unroll: int) -> list[Any]:
        b = self.builder
        before = b.block
        head, body, after = (b.append_basic_block(n) for n in ("head", "body", "after"))
        b.branch(head)
        b.position_at_end(head)
        d = b.phi(_I64)
        d.add_incoming(begin, before)
        phis = self._phis([(before, sums)], len(sums))
        b.cbranch(b.icmp_signed("<", d, end), body, after)
        b.position_at_end(body)
        new = self._steps(list(phis), x_rows, d, unroll)
        d.add_incoming(b.add(d, _I64(unroll)), b.block)
        for phi, value in zip(phis, new, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)
        return phis

    def _steps(self, sums: list[Any], x_rows: list[Any], d: Any, count: int) -> list[Any]:
        """`count` steps of depth, from d on."""
        b = self.builder
        for step in range(count):
            here = b.add(d, _I64(step))
            if self.fetches and not self.masked:
                row_bytes = self.vectors * LANES * _element_bytes(self.storage)
                self._fetch(b.add(self.fetch, b.mul(here, self.fetch_step)), row_bytes)
            sums = self._multiply(sums, x_rows, here, [self._weights(here, v) for v in range(self.vectors)])
        return sums

    def _multiply(self, sums: list[Any], x_rows: list[Any], d: Any, weights: list[Any]) -> list[Any]:
        b = self.builder
        new: list[Any] = []
        for m, x in enumerate(x_rows):  # row by row: all values first would not fit into the registers (-25 %)
            value = self._scalar(x, d)
            old = sums[m * self.vectors : (m + 1) * self.vectors]
            new += [call(b, f"llvm.fma.{_SUFFIX}", _VECTOR, [value, w, s]) for w, s in zip(weights, old, strict=True)]
        return new

    def _fetch(self, address: Any, size: int) -> None:
        """Ask for all lines of so many bytes."""
        b = self.builder
        for line in range(0, size, LINE):
            ask_for(b, b.inttoptr(b.add(address, _I64(line)), ir.PointerType(_F32)))

    def _scalar(self, x: Any, d: Any) -> Any:
        b = self.builder
        pointer = b.inttoptr(b.add(x, b.shl(d, _I64(2))), ir.PointerType(_F32))
        return splat_value(b, b.load(pointer, align=4))


def _tile(rows: int, vectors: int, masked: bool, storage: Storage) -> Any:
    @intrinsic
    def tile(
        typing: Any, x: Any, x_stride: Any, x_index: Any, y: Any, y_stride: Any, y_index: Any, w: Any, w_stride: Any,
        depth: Any, start: Any, columns: Any, fetch: Any, fetch_step: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            Tile(builder, args, rows, vectors, masked=masked, storage=storage).emit()
            return context.get_dummy_value()

        return types.none(*(types.intp,) * 13), codegen

    return tile


class _PanelsTile(Tile):
    """Emits `rows` times so many whole panels as `columns` says, one behind the other, added to what y holds."""

    fetches = FETCHES

    def emit(self) -> None:
        b = self.builder
        x_rows = [self._row(self.x, self.x_stride, self.x_index, m) for m in range(self.rows)]
        y_rows = [self._row(self.y, self.y_stride, self.y_index, m) for m in range(self.rows)]
        panels, first = self.columns, self.w
        row_bytes = _I64(PANEL * _element_bytes(self.storage))
        panel_bytes = b.mul(self.depth, row_bytes)
        self.w_stride, self.fetch_step = _I64(PANEL), row_bytes
        with cgutils.for_range(b, panels) as loop:
            self.w = b.add(first, b.mul(loop.index, panel_bytes))
            self.fetch = b.add(self.w, panel_bytes)
            targets = [b.add(y, b.mul(loop.index, _I64(4 * PANEL))) for y in y_rows]
            sums = [self._load(y, v, False) for y in targets for v in range(self.vectors)]
            for i, value in enumerate(self._products(sums, x_rows)):
                self._store_vector(targets[i // self.vectors], i % self.vectors, value, False)


def _panels_tile(rows: int, storage: Storage) -> Any:
    @intrinsic
    def tile(
        typing: Any, x: Any, x_stride: Any, x_index: Any, y: Any, y_stride: Any, y_index: Any, w: Any, depth: Any,
        panels: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            zero = _I64(0)
            operands = [*args[:7], zero, args[7], zero, args[8], zero, zero]
            _PanelsTile(builder, operands, rows, VECTORS, masked=False, storage=storage).emit()
            return context.get_dummy_value()

        return types.none(*(types.intp,) * 9), codegen

    return tile


@njit(nogil=True)
def tile_rows(rows: int) -> int:
    """Of the tile to begin with: the largest, but two of four for eight rows where six would leave two."""
    for size in (12, 8):
        if size <= MAX_ROWS and rows >= size:
            return size
    if rows >= 6 and (rows != 8 or MAX_ROWS > 6):
        return 6
    return min(rows, 4)


@njit(nogil=True)
def _fetching_tiles(rows: int) -> int:
    """How many of the tiles that `rows` are cut into begin where at least FETCHING_ROWS are left."""
    tiles = 0
    while rows >= FETCHING_ROWS:
        rows -= tile_rows(rows)
        tiles += 1
    return tiles


def _by_rows(vectors: int, *, masked: bool, storage: Storage) -> Any:
    """A function that runs one tile of as many of `rows` as fit, and returns how many those were.

    The operands are spelled out, here and in `multiply`: passed on as `*operands`, they cost a third of the speed.
    """
    t1, t2, t3, t4, t6 = (_tile(m, vectors, masked, storage) for m in (1, 2, 3, 4, 6))
    t8, t12 = (_tile(m, vectors, masked, storage) if m <= MAX_ROWS else t6 for m in (8, 12))

    @njit(inline="always")
    @variant(vectors, int(masked), int(storage))
    def run(
        rows: int, x: int, x_stride: int, x_rows: int, y: int, y_stride: int, y_rows: int, w: int, w_stride: int,
        depth: int, start: int, columns: int, fetch: int, fetch_step: int,
    ) -> int:  # fmt: skip
        size = tile_rows(rows)
        if size == 12:
            t12(x, x_stride, x_rows, y, y_stride, y_rows, w, w_stride, depth, start, columns, fetch, fetch_step)
        elif size == 8:
            t8(x, x_stride, x_rows, y, y_stride, y_rows, w, w_stride, depth, start, columns, fetch, fetch_step)
        elif size == 6:
            t6(x, x_stride, x_rows, y, y_stride, y_rows, w, w_stride, depth, start, columns, fetch, fetch_step)
        elif size == 4:
            t4(x, x_stride, x_rows, y, y_stride, y_rows, w, w_stride, depth, start, columns, fetch, fetch_step)
        elif size == 3:
            t3(x, x_stride, x_rows, y, y_stride, y_rows, w, w_stride, depth, start, columns, fetch, fetch_step)
        elif size == 2:
            t2(x, x_stride, x_rows, y, y_stride, y_rows, w, w_stride, depth, start, columns, fetch, fetch_step)
        else:
            t1(x, x_stride, x_rows, y, y_stride, y_rows, w, w_stride, depth, start, columns, fetch, fetch_step)
        return size

    return run


_wide, _masked, _narrow = (
    _by_rows(vectors, masked=masked, storage=Storage.NATIVE)
    for vectors, masked in ((VECTORS, False), (VECTORS, True), (1, True))
)


@njit(inline="always")
def _native(
    rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, w_stride: int,
    depth: int, start: int, columns: int, padded: int, is_followed: int,
) -> None:  # fmt: skip
    done = tiles = 0
    while done < rows:
        some = rows - done
        fetch, fetch_step = w, 0  # what is there already
        if is_followed and some >= FETCHING_ROWS:
            fetch_step = 4 * w_stride // _fetching_tiles(rows)
            fetch = w + (4 * w_stride + tiles * fetch_step) * depth
            tiles += 1
        x_rows, y_rows = x_index + 4 * done, y_index + 4 * done
        if padded:
            done += _wide(
                some, x, x_stride, x_rows, y, y_stride, y_rows, w, w_stride, depth, start, columns, fetch, fetch_step,
            )  # fmt: skip
        elif columns <= LANES:
            done += _narrow(
                some, x, x_stride, x_rows, y, y_stride, y_rows, w, w_stride, depth, start, columns, fetch, fetch_step,
            )  # fmt: skip
        else:
            done += _masked(
                some, x, x_stride, x_rows, y, y_stride, y_rows, w, w_stride, depth, start, columns, fetch, fetch_step,
            )  # fmt: skip


def _multiply_16_bit(storage: Storage) -> Any:
    """As `multiply`, for panels of 16 bits. It reads, and does not use, up to PANEL - 1 elements behind the last row.

    AVX2 cannot load part of a vector of 16-bit elements: that is what `tables.ARENA_SLACK` is for.
    """
    wide, narrow = (_by_rows(vectors, masked=False, storage=storage) for vectors in (VECTORS, 1))

    @njit(inline="always")
    @variant(int(storage))
    def multiply_16_bit(
        rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, w_stride: int,
        depth: int, start: int, columns: int,
    ) -> None:  # fmt: skip
        done = tiles = 0
        while done < rows:
            some, x_rows, y_rows = rows - done, x_index + 4 * done, y_index + 4 * done
            fetch, fetch_step = (w + AHEAD, 2 * w_stride) if rows < FETCHING_ROWS else (w, 0)
            if some >= FETCHING_ROWS:
                fetch_step = 2 * w_stride // _fetching_tiles(rows)
                fetch = w + (2 * w_stride + tiles * fetch_step) * depth
                tiles += 1
            if columns <= LANES:
                done += narrow(
                    some, x, x_stride, x_rows, y, y_stride, y_rows, w, w_stride, depth, start, columns, fetch,
                    fetch_step,
                )  # fmt: skip
            else:
                done += wide(
                    some, x, x_stride, x_rows, y, y_stride, y_rows, w, w_stride, depth, start, columns, fetch,
                    fetch_step,
                )  # fmt: skip

    return multiply_16_bit


_float16, _bfloat16 = map(_multiply_16_bit, (Storage.FLOAT16, Storage.BFLOAT16))


@Separate
def multiply(
    rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, w_stride: int,
    depth: int, start: int, columns: int, padded: int,
) -> None:  # fmt: skip
    """Any number of rows times up to PANEL columns of fp32. `padded`: all PANEL columns of w may be read."""
    _native(rows, x, x_stride, x_index, y, y_stride, y_index, w, w_stride, depth, start, columns, padded, 1)


@Separate
def multiply_float16(
    rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, w_stride: int,
    depth: int, start: int, columns: int,
) -> None:  # fmt: skip
    _float16(rows, x, x_stride, x_index, y, y_stride, y_index, w, w_stride, depth, start, columns)


@Separate
def multiply_bfloat16(
    rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, w_stride: int,
    depth: int, start: int, columns: int,
) -> None:  # fmt: skip
    _bfloat16(rows, x, x_stride, x_index, y, y_stride, y_index, w, w_stride, depth, start, columns)


# Of whole panels, with a stride that is known: without, tiles have too few registers, and 16 rows took 1.1 to 1.5 times
# as long.


@Separate
def multiply_panel(
    rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, depth: int, start: int,
    columns: int, is_followed: int,
) -> None:  # fmt: skip
    """`is_followed`: what is needed next lies behind the panel."""
    _native(rows, x, x_stride, x_index, y, y_stride, y_index, w, PANEL, depth, start, columns, 1, is_followed)


@Separate
def multiply_panel_float16(
    rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, depth: int, start: int,
    columns: int,
) -> None:  # fmt: skip
    _float16(rows, x, x_stride, x_index, y, y_stride, y_index, w, PANEL, depth, start, columns)


@Separate
def multiply_panel_bfloat16(
    rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, depth: int, start: int,
    columns: int,
) -> None:  # fmt: skip
    _bfloat16(rows, x, x_stride, x_index, y, y_stride, y_index, w, PANEL, depth, start, columns)


@njit(nogil=True)
def multiply_panel_stored(
    storage: int, rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int,
    depth: int, start: int, columns: int,
) -> None:  # fmt: skip
    """A whole panel of any storage; see `multiply`."""
    if storage == NATIVE:
        multiply_panel(rows, x, x_stride, x_index, y, y_stride, y_index, w, depth, start, columns, 1)
    elif storage == FLOAT16:
        multiply_panel_float16(rows, x, x_stride, x_index, y, y_stride, y_index, w, depth, start, columns)
    else:
        multiply_panel_bfloat16(rows, x, x_stride, x_index, y, y_stride, y_index, w, depth, start, columns)


@njit(nogil=True)
def element_bytes_of(storage: int) -> int:
    return 4 if storage == NATIVE else 2


@njit(nogil=True)
def multiply_stored(
    storage: int, rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int,
    w_stride: int, depth: int, start: int, columns: int, padded: bool,
) -> None:  # fmt: skip
    """A panel of any storage; see `multiply`."""
    if storage == NATIVE:
        multiply(rows, x, x_stride, x_index, y, y_stride, y_index, w, w_stride, depth, start, columns, padded)
    elif storage == FLOAT16:
        multiply_float16(rows, x, x_stride, x_index, y, y_stride, y_index, w, w_stride, depth, start, columns)
    else:
        multiply_bfloat16(rows, x, x_stride, x_index, y, y_stride, y_index, w, w_stride, depth, start, columns)


def _add_panels(storage: Storage) -> Any:
    t1, t2, t3, t4, t6 = (_panels_tile(m, storage) for m in (1, 2, 3, 4, 6))
    t8, t12 = (_panels_tile(m, storage) if m <= MAX_ROWS else t6 for m in (8, 12))

    @njit(inline="always")
    @variant(int(storage))
    def add_panels(
        rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, depth: int,
        panels: int,
    ) -> None:  # fmt: skip
        """y += x @ w for whole panels, one behind the other: a few rows at a time, for all of them.

        So the panels come from the nearest cache but for the first rows, and y is passed in order: rows a multiple of
        a page apart, all of them panel by panel, drive each other out of it.
        """
        done = 0
        while done < rows:
            x_rows, y_rows, size = x_index + 4 * done, y_index + 4 * done, tile_rows(rows - done)
            if size == 12:
                t12(x, x_stride, x_rows, y, y_stride, y_rows, w, depth, panels)
            elif size == 8:
                t8(x, x_stride, x_rows, y, y_stride, y_rows, w, depth, panels)
            elif size == 6:
                t6(x, x_stride, x_rows, y, y_stride, y_rows, w, depth, panels)
            elif size == 4:
                t4(x, x_stride, x_rows, y, y_stride, y_rows, w, depth, panels)
            elif size == 3:
                t3(x, x_stride, x_rows, y, y_stride, y_rows, w, depth, panels)
            elif size == 2:
                t2(x, x_stride, x_rows, y, y_stride, y_rows, w, depth, panels)
            else:
                t1(x, x_stride, x_rows, y, y_stride, y_rows, w, depth, panels)
            done += size

    return add_panels


_add_native, _add_float16, _add_bfloat16 = map(_add_panels, Storage)


@Separate
def add_panels_native(
    rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, depth: int,
    panels: int,
) -> None:  # fmt: skip
    _add_native(rows, x, x_stride, x_index, y, y_stride, y_index, w, depth, panels)


@Separate
def add_panels_float16(
    rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, depth: int,
    panels: int,
) -> None:  # fmt: skip
    _add_float16(rows, x, x_stride, x_index, y, y_stride, y_index, w, depth, panels)


@Separate
def add_panels_bfloat16(
    rows: int, x: int, x_stride: int, x_index: int, y: int, y_stride: int, y_index: int, w: int, depth: int,
    panels: int,
) -> None:  # fmt: skip
    _add_bfloat16(rows, x, x_stride, x_index, y, y_stride, y_index, w, depth, panels)
