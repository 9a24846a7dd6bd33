"""A whole forward pass as a list of operations, run by all threads in one call without touching Python.

Threads share out each operation's pieces (`team.py`) and go on to the next once all of them are done. An operation is a
row of integers, of which the first says what it is; `Program` writes those rows, `_run` reads them.
"""

# ruff: noqa: PLR0917  # Numba takes arguments by position

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from gralora_kernels.cpu.adapters import COLUMNS, SCRATCH_BYTES, expand_piece, shrink_piece
from gralora_kernels.cpu.attention import attend_piece, attention_rows, scratch_bytes
from gralora_kernels.cpu.linear import FLOAT_BYTES, ROW_BLOCK, PackedWeight, linear_piece, num_pieces, row_numbers
from gralora_kernels.cpu.microkernel import FROM_OUTPUT, FROM_ZERO
from gralora_kernels.cpu.rows import gate, rms_norm, rotate, scale_into, scatter
from gralora_kernels.cpu.simd import load_int64
from gralora_kernels.cpu.team import LINE, fetch_add, wait_for
from gralora_kernels.cpu.threads import region_lock
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import GroupTable

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]

EMBED, NORM, NORM_LAST, LINEAR, HEAD, EXPAND, ROTATE, ATTEND, GATE = range(9)

# What a row of `ops` holds, after its kind. Addresses are of float32 memory.
KIND, X, Y, WEIGHT, DEPTH, COLUMNS_OUT, START, GROUP, KEYS, VALUES, EXTRA, NUM_FIELDS = range(12)
# What a row of `groups` holds, per module of the group.
INDEX, SCALES, COLUMN, OUT_FEATURES, NUM_MODULE_FIELDS = range(5)
MAX_MODULES = 3  # q, k, v
# What `step` holds: the sizes and addresses of one step.
(NUM_TOKENS, NUM_LAST, NUM_ITEMS, NUM_ATTENTION, TOKEN_IDS, POSITIONS, KV_SLOTS, LAST, ORDER, ITEMS, U, U_STRIDE, ARENA,
 MAX_PAGES, PIECES, PAGE_TABLE, NUM_STEP_FIELDS) = range(17)  # fmt: skip
# What `shape` holds: what is the same for all layers and steps.
HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, PAGE_SIZE, COS, SIN, ACTIVATION, NUM_SHAPE_FIELDS = range(9)

TOKENS_PER_PIECE = 4  # of an operation on rows


@njit(nogil=True)
def _row_pieces(rows: int) -> int:
    return (rows + TOKENS_PER_PIECE - 1) // TOKENS_PER_PIECE


@njit(nogil=True)
def _expand_pieces(group: Int64s, item_count: int) -> int:
    pieces = 0
    for module in range(MAX_MODULES):
        pieces += (group[module, OUT_FEATURES] + COLUMNS - 1) // COLUMNS
    return pieces * item_count


@njit(nogil=True)
def _num_modules(group: Int64s) -> int:
    modules = 0
    for module in range(MAX_MODULES):
        modules += group[module, OUT_FEATURES] > 0
    return modules


@njit(nogil=True)
def _num_pieces(op: Int64s, groups: Int64s, step: Int64s, shape: Int64s) -> int:
    kind = op[KIND]
    tokens = step[NUM_TOKENS]
    if kind == LINEAR:
        return num_pieces(tokens, op[COLUMNS_OUT]) + _num_modules(groups[op[GROUP]]) * step[NUM_ITEMS]
    if kind == EXPAND:
        return _expand_pieces(groups[op[GROUP]], step[NUM_ITEMS])
    if kind == ATTEND:
        return step[NUM_ATTENTION] * shape[KV_HEADS]
    if kind == HEAD:
        return num_pieces(step[NUM_LAST], op[COLUMNS_OUT])
    return _row_pieces(step[NUM_LAST] if kind == NORM_LAST else tokens)


@njit(nogil=True)
def _linear(piece: int, op: Int64s, groups: Int64s, step: Int64s, scratch: int, iota: int) -> None:
    """Shrinks first: they are the longer pieces when a prompt has an adapter."""
    group = groups[op[GROUP]]
    modules = _num_modules(group)
    shrinks = modules * step[NUM_ITEMS]
    if piece >= shrinks:
        tokens = step[NUM_TOKENS]
        linear_piece(piece - shrinks, tokens, op[X], op[DEPTH], op[Y], op[COLUMNS_OUT], op[WEIGHT], op[START], iota)
        return
    item, module = piece // modules, piece % modules
    column = module * (step[U_STRIDE] // MAX_MODULES) * FLOAT_BYTES
    shrink_piece(
        step[ITEMS] + 12 * item, group[module, INDEX], group[module, SCALES], op[X], op[DEPTH], step[ORDER],
        step[U] + column, step[U_STRIDE], step[ARENA], scratch, iota,
    )  # fmt: skip


@njit(nogil=True)
def _expand(piece: int, op: Int64s, groups: Int64s, step: Int64s, iota: int) -> None:
    group = groups[op[GROUP]]
    per_item = _expand_pieces(group, 1)
    item, piece = piece // per_item, piece % per_item
    module = 0
    while True:
        pieces = (group[module, OUT_FEATURES] + COLUMNS - 1) // COLUMNS
        if piece < pieces:
            break
        piece -= pieces
        module += 1
    column = module * (step[U_STRIDE] // MAX_MODULES) * FLOAT_BYTES
    expand_piece(
        step[ITEMS] + 12 * item, group[module, INDEX], piece * COLUMNS, op[Y] + group[module, COLUMN] * FLOAT_BYTES,
        op[COLUMNS_OUT], group[module, OUT_FEATURES], step[ORDER], step[U] + column, step[U_STRIDE], step[ARENA], iota,
    )  # fmt: skip


@njit(nogil=True)
def _rotate(token: int, op: Int64s, step: Int64s, shape: Int64s, eps: float) -> None:
    """Norm and rotate the queries and keys of one token, and put its keys and values into their page.

    X is [tokens, heads + 2 * kv_heads, head_dim]; WEIGHT and EXTRA are the norms' weights, 0: none.
    """
    heads, kv_heads, head_dim, page_size = shape[HEADS], shape[KV_HEADS], shape[HEAD_DIM], shape[PAGE_SIZE]
    head_bytes = head_dim * FLOAT_BYTES
    first = op[X] + token * (heads + 2 * kv_heads) * head_bytes
    shift = load_int64(step[POSITIONS], token) * shape[ROTARY_DIM] * FLOAT_BYTES
    for head in range(heads + kv_heads):
        at = first + head * head_bytes
        norm = op[WEIGHT] if head < heads else op[EXTRA]
        if norm:
            rms_norm(at, norm, at, head_dim, eps)
        rotate(at, shape[COS] + shift, shape[SIN] + shift, shape[ROTARY_DIM])
    slot = load_int64(step[KV_SLOTS], token)
    page, offset = slot // page_size, slot % page_size
    for head in range(kv_heads):
        at = (page * kv_heads + head) * page_size * head_dim
        source = first + (heads + head) * head_bytes
        scatter(source, op[KEYS] + (at + offset) * FLOAT_BYTES, head_dim, page_size)
        scale_into(source + kv_heads * head_bytes, op[VALUES] + (at + offset * head_dim) * FLOAT_BYTES, head_dim, 1.0)


@njit(nogil=True)
def _attend(piece: int, op: Int64s, step: Int64s, shape: Int64s, scale: float, scratch: int, iota: int) -> None:
    work = step[PIECES] + piece // shape[KV_HEADS] * 32
    pages = step[PAGE_TABLE] + 4 * step[MAX_PAGES] * load_int64(work, 0)
    attend_piece(
        load_int64(work, 1), load_int64(work, 2), load_int64(work, 3), piece % shape[KV_HEADS], pages, op[X],
        shape[HEADS] + 2 * shape[KV_HEADS], op[Y], shape[HEADS], shape[KV_HEADS], shape[HEAD_DIM], op[KEYS],
        op[VALUES], shape[PAGE_SIZE], scale, op[EXTRA], scratch, iota,
    )  # fmt: skip


@njit(nogil=True)
def _row(kind: int, token: int, op: Int64s, step: Int64s, shape: Int64s, real: float) -> None:
    """An operation on one token's row."""
    depth = op[DEPTH]
    if kind == EMBED:
        row = load_int64(step[TOKEN_IDS], token) * depth * FLOAT_BYTES
        scale_into(op[X] + row, op[Y] + token * depth * FLOAT_BYTES, depth, real)
    elif kind == NORM:
        shift = token * depth * FLOAT_BYTES
        rms_norm(op[X] + shift, op[WEIGHT], op[Y] + shift, depth, real)
    elif kind == NORM_LAST:
        source = op[X] + load_int64(step[LAST], token) * depth * FLOAT_BYTES
        rms_norm(source, op[WEIGHT], op[Y] + token * depth * FLOAT_BYTES, depth, real)
    elif kind == ROTATE:
        _rotate(token, op, step, shape, real)
    else:
        gates = op[X] + 2 * token * depth * FLOAT_BYTES
        gate(gates, gates + depth * FLOAT_BYTES, op[Y] + token * depth * FLOAT_BYTES, depth, shape[ACTIVATION])


@njit(nogil=True)
def _piece(
    piece: int, op: Int64s, real: float, groups: Int64s, step: Int64s, shape: Int64s, scratch: int, iota: int,
) -> None:  # fmt: skip
    kind = op[KIND]
    if kind == LINEAR:
        _linear(piece, op, groups, step, scratch, iota)
    elif kind == EXPAND:
        _expand(piece, op, groups, step, iota)
    elif kind == ATTEND:
        _attend(piece, op, step, shape, real, scratch, iota)
    elif kind == HEAD:
        linear_piece(piece, step[NUM_LAST], op[X], op[DEPTH], op[Y], op[COLUMNS_OUT], op[WEIGHT], op[START], iota)
    else:
        rows = step[NUM_LAST] if kind == NORM_LAST else step[NUM_TOKENS]
        for token in range(piece * TOKENS_PER_PIECE, min(rows, (piece + 1) * TOKENS_PER_PIECE)):
            _row(kind, token, op, step, shape, real)


@njit(nogil=True, parallel=True, cache=True)
def _run(
    parts: int, ops: Int64s, reals: Floats, groups: Int64s, step: Int64s, shape: Int64s, counters: Int64s,
    scratch: int, scratch_size: int, iota: int,
) -> None:  # fmt: skip
    """Each thread begins with a run of pieces of its own, so that it reads memory in order, and then helps the others.

    `counters` [ops, parts + 1, LINE / 8]: pieces claimed of each run, and pieces done; zero at the start.
    """
    for part in prange(parts):
        for i in range(ops.shape[0]):
            op = ops[i]
            pieces = _num_pieces(op, groups, step, shape)
            claimed = counters.ctypes.data + LINE * (parts + 1) * i
            done = claimed + LINE * parts
            own = scratch + part * scratch_size
            for other in range(parts):
                owner = (part + other) % parts
                first, end = owner * pieces // parts, (owner + 1) * pieces // parts
                while True:
                    piece = first + fetch_add(claimed + LINE * owner)
                    if piece >= end:
                        break
                    _piece(piece, op, reals[i], groups, step, shape, own, iota)
                    fetch_add(done)
            wait_for(done, pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """What is the same for all layers. `cos`, `sin` [positions, rotary_dim]."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    activation: int
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What changes from step to step. All tensors are int64 but where it says otherwise."""

    token_ids: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    kv_slots: Tensor  # [tokens]
    last: Tensor  # the tokens whose logits are wanted
    page_table: Tensor  # int32 [rows, max_pages]
    pieces: Int64s  # [pieces, 4], of `attention_pieces`
    grouping: Grouping


class Program:
    """The operations of one model, in order. Holds the buffers between them, so calls to `run` take turns."""

    def __init__(self, shape: DecoderShape, *, max_tokens: int, arena: Tensor) -> None:
        attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.hidden = torch.zeros(max_tokens, shape.hidden)
        self.normed = torch.zeros(max_tokens, shape.hidden)
        self.qkv = torch.zeros(max_tokens, attention)
        self.attended = torch.zeros(max_tokens, shape.heads * shape.head_dim)
        self.gates_and_ups = torch.zeros(max_tokens, 2 * shape.intermediate)
        self.gated = torch.zeros(max_tokens, shape.intermediate)
        self._arena = arena
        self._u = torch.zeros(0)
        self._kept: list[object] = [shape]  # operations hold addresses: what lies there must stay
        self._ops: list[list[int]] = []
        self._reals: list[float] = []
        self._groups: list[list[list[int]]] = []
        self._shape = np.zeros(NUM_SHAPE_FIELDS, np.int64)
        self._shape[[HEADS, KV_HEADS]] = shape.heads, shape.kv_heads
        self._shape[[HEAD_DIM, PAGE_SIZE]] = shape.head_dim, shape.page_size
        self._shape[[ROTARY_DIM, COS, SIN]] = shape.cos.shape[1], shape.cos.data_ptr(), shape.sin.data_ptr()
        self._shape[ACTIVATION] = shape.activation
        attend_scratch = scratch_bytes(shape.heads // shape.kv_heads, shape.head_dim, shape.page_size)
        self._scratch_size = -(-max(attend_scratch, SCRATCH_BYTES) // LINE) * LINE
        self._parts = get_num_threads()
        # Of a step's tokens, of a product's rows, of a piece's queries.
        self._iota = row_numbers(max(max_tokens, ROW_BLOCK, attention_rows(shape.heads // shape.kv_heads)))
        self._scratch = torch.zeros(self._parts * self._scratch_size, dtype=torch.uint8)

    def embed(self, table: Tensor, factor: float) -> None:
        """hidden = factor * table[token]."""
        self._add(EMBED, table, self.hidden, table.shape[1], real=factor)

    def norm(self, weight: Tensor, eps: float) -> None:
        """normed = RMS norm of hidden."""
        self._add(NORM, self.hidden, self.normed, len(weight), WEIGHT=weight, real=eps)

    def linear(
        self, x: Tensor, y: Tensor, weight: PackedWeight, group: GroupTable, *, bias: Tensor | None = None,
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        """y = x @ weight.T + bias, or y += x @ weight.T; then what the adapters of `group` add."""
        assert not (accumulate and bias is not None), "sums begin at one of the two"
        start = FROM_OUTPUT if accumulate else FROM_ZERO if bias is None else bias
        self._groups.append(_group(group))
        self._kept += [weight, group]
        for kind in (LINEAR, EXPAND):
            self._add(
                kind, x, y, weight.in_features, WEIGHT=weight.panels, COLUMNS_OUT=weight.out_features, START=start,
                GROUP=len(self._groups) - 1,
            )  # fmt: skip

    def attend(
        self, keys: Tensor, values: Tensor, *, scale: float, window: int, q_norm: Tensor | None, k_norm: Tensor | None,
        eps: float,
    ) -> None:  # fmt: skip
        """qkv -> attended, by way of this layer's pages; window 0: no limit."""
        pages = {"KEYS": keys, "VALUES": values}
        norms = {"WEIGHT": 0 if q_norm is None else q_norm, "EXTRA": 0 if k_norm is None else k_norm}
        self._add(ROTATE, self.qkv, self.attended, 0, real=eps, **pages, **norms)
        self._add(ATTEND, self.qkv, self.attended, 0, real=scale, **pages, EXTRA=window)

    def gate(self) -> None:
        """gates_and_ups -> gated."""
        self._add(GATE, self.gates_and_ups, self.gated, self.gated.shape[1])

    def head(self, norm: Tensor, eps: float, weight: PackedWeight, bias: Tensor | None) -> None:
        """The logits of the last tokens: `run` says where they go."""
        self._vocab_size = weight.out_features
        self._add(NORM_LAST, self.hidden, self.normed, len(norm), WEIGHT=norm, real=eps)
        self._add(
            HEAD, self.normed, 0, weight.in_features, WEIGHT=weight.panels, COLUMNS_OUT=weight.out_features,
            START=FROM_ZERO if bias is None else bias,
        )  # fmt: skip
        self._kept.append(weight)
        self._table = np.array(self._ops, np.int64)
        self._factors = np.array(self._reals, np.float64)
        self._group_table = np.array(self._groups, np.int64)
        self._counters = np.zeros((len(self._ops), self._parts + 1, LINE // 8), np.int64)

    def run(self, step: Step) -> Tensor:
        """Logits [len(step.last), vocab]."""
        logits = torch.empty(len(step.last), self._vocab_size)
        self._table[-1, Y] = logits.data_ptr()
        self._counters.fill(0)
        with region_lock:
            _run(
                self._parts, self._table, self._factors, self._group_table, self._step_fields(step), self._shape,
                self._counters, self._scratch.data_ptr(), self._scratch_size, self._iota,
            )  # fmt: skip
        return logits

    def _step_fields(self, step: Step) -> Int64s:
        grouping = step.grouping
        stride = MAX_MODULES * grouping.max_width
        if self._u.numel() < grouping.num_adapted * stride:
            self._u = torch.zeros(grouping.num_adapted * stride)
        fields = np.zeros(NUM_STEP_FIELDS, np.int64)
        fields[[NUM_TOKENS, NUM_LAST, NUM_ITEMS]] = len(step.token_ids), len(step.last), grouping.num_items
        fields[[NUM_ATTENTION, PIECES]] = len(step.pieces), step.pieces.ctypes.data
        fields[[TOKEN_IDS, POSITIONS]] = step.token_ids.data_ptr(), step.positions.data_ptr()
        fields[[KV_SLOTS, LAST]] = step.kv_slots.data_ptr(), step.last.data_ptr()
        fields[[ORDER, ITEMS]] = grouping.order.ctypes.data, grouping.items.ctypes.data
        fields[[U, U_STRIDE, ARENA]] = self._u.data_ptr(), stride, self._arena.data_ptr()
        fields[[MAX_PAGES, PAGE_TABLE]] = step.page_table.shape[1], step.page_table.data_ptr()
        return fields

    def _add(
        self, kind: int, x: Tensor, y: Tensor | int, depth: int, *, real: float = 0.0, **fields: Tensor | int
    ) -> None:
        row = [0] * NUM_FIELDS
        row[GROUP] = -1
        for name, value in {"KIND": kind, "X": x, "Y": y, "DEPTH": depth, **fields}.items():
            if isinstance(value, Tensor):
                _check(name, value)
                self._kept.append(value)
                row[globals()[name]] = value.data_ptr()
            else:
                row[globals()[name]] = value
        self._ops.append(row)
        self._reals.append(real)


def _check(name: str, tensor: Tensor) -> None:
    """The program reads raw addresses."""
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32, got {tensor.dtype} with strides {tensor.stride()}")


def _group(group: GroupTable) -> list[list[int]]:
    """The modules of a group, as `_run` reads them."""
    rows = [[0] * NUM_MODULE_FIELDS for _ in range(MAX_MODULES)]
    for row, table, column in zip(rows, group.modules, group.column_starts, strict=False):
        row[INDEX], row[SCALES] = table.host_index.ctypes.data, table.host_scale.ctypes.data
        row[COLUMN], row[OUT_FEATURES] = column, table.out_features
    return rows
