"""A list of operations, run by all threads in one call without touching Python.

Threads share out each operation's pieces (`team.py`) and go on to the next once all of them are done. An operation is a
row of integers, of which the first says what it is: `program.py` writes a model's, `backend.py` those of one group.
"""

# ruff: noqa: PLR0917  # Numba takes arguments by position

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import njit, prange
from torch import Tensor

from gralora_kernels.cpu.adapters import COLUMNS, add_kept_item, expand_piece, set_aside_item, shrink_piece
from gralora_kernels.cpu.attention import attend_piece
from gralora_kernels.cpu.blocks import BLOCK, BLOCKS_8, ROW_EIGHTS_BYTES, widen_row
from gralora_kernels.cpu.linear import FLOAT_BYTES, linear_piece, num_pieces
from gralora_kernels.cpu.microkernel import element_bytes_of
from gralora_kernels.cpu.rows import (
    add_scaled,
    gate,
    layer_norm,
    rms_norm,
    rotate,
    rotate_neighbours,
    scale_into,
    scatter,
    widen_into,
)
from gralora_kernels.cpu.separate import Separate, kernel
from gralora_kernels.cpu.simd import load_int32, load_int64
from gralora_kernels.cpu.team import LINE, fetch_add, wait_for
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import GroupTable

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]

EMBED, NORM, NORM_LAST, LINEAR, HEAD, EXPAND, ROTATE, ATTEND, GATE, JOIN, SET_ASIDE, ADD_KEPT = range(12)

# What a row of `ops` holds, after its kind. Addresses are of float32 memory, unless STORAGE says otherwise: of WEIGHT
# in LINEAR and HEAD, of X in EMBED.
# A row of `reals` holds two numbers: a norm's eps or a factor, and of those that have two, the later one.
(KIND, X, Y, WEIGHT, DEPTH, COLUMNS_OUT, START, GROUP, KEYS, VALUES, EXTRA, COS, SIN, STORAGE, OTHER_GROUP,
 NUM_FIELDS) = range(16)  # fmt: skip
NO_GROUP = -1
# What a row of `groups` holds, per module of the group.
INDEX, SCALES, STORAGES, AFFINES, COLUMN, OUT_FEATURES, NUM_MODULE_FIELDS = range(7)
# What `step` holds: the sizes and addresses of one step.
(NUM_TOKENS, NUM_LAST, NUM_ITEMS, NUM_ATTENTION, TOKEN_IDS, POSITIONS, KV_SLOTS, LAST, ORDER, ITEMS, U, U_WIDTH, ARENA,
 MAX_PAGES, PIECES, PAGE_TABLE, HAS_AFFINE, TOKEN_SLOTS, NUM_STEP_FIELDS) = range(19)  # fmt: skip
# What `shape` holds: what is the same for all layers and steps.
(HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, PAGE_SIZE, ACTIVATION, NORMS_WHOLE_HEADS, TURNS_NEIGHBOURS, CENTRES, UNGATED,
 NUM_SHAPE_FIELDS) = range(11)  # fmt: skip

TOKENS_PER_PIECE = 4  # of an operation on rows
ITEMS_PER_PIECE = 4  # of what comes before and after a product whose sums begin at the stream


@njit(nogil=True)
def _row_pieces(rows: int) -> int:
    return (rows + TOKENS_PER_PIECE - 1) // TOKENS_PER_PIECE


@njit(nogil=True)
def _expand_pieces(group: Int64s, item_count: int) -> int:
    pieces = 0
    for module in range(group.shape[0]):
        pieces += (group[module, OUT_FEATURES] + COLUMNS - 1) // COLUMNS
    return pieces * item_count


@njit(nogil=True)
def _num_modules(group: Int64s) -> int:
    modules = 0
    for module in range(group.shape[0]):
        modules += group[module, OUT_FEATURES] > 0
    return modules


@njit(nogil=True)
def _num_pieces(op: Int64s, groups: Int64s, step: Int64s, shape: Int64s) -> int:
    kind = op[KIND]
    tokens = step[NUM_TOKENS]
    if kind == LINEAR:
        return num_pieces(tokens, op[COLUMNS_OUT], op[STORAGE]) + _num_modules(groups[op[GROUP]]) * step[NUM_ITEMS]
    if kind == EXPAND:
        return _expand_pieces(groups[op[GROUP]], step[NUM_ITEMS])
    if kind == ATTEND:
        return step[NUM_ATTENTION] * shape[KV_HEADS]
    if kind == HEAD:
        return num_pieces(step[NUM_LAST], op[COLUMNS_OUT], op[STORAGE])
    if kind in (SET_ASIDE, ADD_KEPT):
        return (step[NUM_ITEMS] + ITEMS_PER_PIECE - 1) // ITEMS_PER_PIECE if step[HAS_AFFINE] else 0
    return _row_pieces(step[NUM_LAST] if kind == NORM_LAST else tokens)


@njit(nogil=True)
def _linear(piece: int, op: Int64s, groups: Int64s, step: Int64s, scratch: int, iota: int) -> None:
    """Shrinks first: they are the longer pieces when a prompt has an adapter."""
    group = groups[op[GROUP]]
    modules = _num_modules(group)
    shrinks = modules * step[NUM_ITEMS]
    if piece >= shrinks:
        tokens = step[NUM_TOKENS]
        linear_piece(
            piece - shrinks, tokens, op[X], op[DEPTH], op[Y], op[COLUMNS_OUT], op[WEIGHT], op[STORAGE], op[START],
            scratch, iota,
        )  # fmt: skip
        return
    item, module = piece // modules, piece % modules
    column = module * step[U_WIDTH] * FLOAT_BYTES
    shrink_piece(
        step[ITEMS] + 12 * item, group[module, INDEX], group[module, SCALES], group[module, STORAGES], op[X],
        op[DEPTH], step[ORDER], step[U] + column, group.shape[0] * step[U_WIDTH], step[ARENA], scratch, iota,
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
    column = module * step[U_WIDTH] * FLOAT_BYTES
    expand_piece(
        step[ITEMS] + 12 * item, group[module, INDEX], group[module, STORAGES], group[module, AFFINES],
        piece * COLUMNS, op[Y] + group[module, COLUMN] * FLOAT_BYTES, op[COLUMNS_OUT], group[module, OUT_FEATURES],
        step[ORDER], step[U] + column, group.shape[0] * step[U_WIDTH], step[ARENA], iota,
    )  # fmt: skip


@njit(nogil=True)
def _keep(piece: int, op: Int64s, groups: Int64s, step: Int64s) -> None:
    """Of a group of one module."""
    affines = groups[op[GROUP], 0, AFFINES]
    for item in range(piece * ITEMS_PER_PIECE, min(step[NUM_ITEMS], (piece + 1) * ITEMS_PER_PIECE)):
        if op[KIND] == SET_ASIDE:
            set_aside_item(step[ITEMS] + 12 * item, affines, op[Y], op[EXTRA], op[COLUMNS_OUT], step[ORDER])
        else:
            add_kept_item(step[ITEMS] + 12 * item, affines, op[Y], op[EXTRA], op[COLUMNS_OUT], step[ORDER])


@njit(nogil=True)
def _norms_of(group: int, groups: Int64s, step: Int64s) -> int:
    """The AFFINES of a norm; 0: it has none, or nobody in this step has."""
    return groups[group, 0, AFFINES] if group != NO_GROUP and step[HAS_AFFINE] else 0


@njit(nogil=True)
def _own_norm(token: int, norms: int, step: Int64s) -> int:
    """Where the token's adapter has its own weight of a norm, with its bias behind it; 0: nowhere."""
    if norms == 0:
        return 0
    slot = load_int32(step[TOKEN_SLOTS], token)
    at = load_int64(norms, slot) if slot >= 0 else 0
    return step[ARENA] + (at - 1) * FLOAT_BYTES if at else 0


@njit(nogil=True)
def _rotate(token: int, op: Int64s, step: Int64s, shape: Int64s, norms: int, other_norms: int, eps: float) -> None:
    """Norm and rotate the queries and keys of one token, and put its keys and values into their page.

    X is [tokens, heads + 2 * kv_heads, head_dim]; WEIGHT and EXTRA are the norms' weights, 0: none; COS and SIN are
    tables of positions.
    """
    q_norm = _own_norm(token, norms, step) or op[WEIGHT]
    k_norm = _own_norm(token, other_norms, step) or op[EXTRA]
    heads, kv_heads, head_dim, page_size = shape[HEADS], shape[KV_HEADS], shape[HEAD_DIM], shape[PAGE_SIZE]
    head_bytes = head_dim * FLOAT_BYTES
    first = op[X] + token * (heads + 2 * kv_heads) * head_bytes
    shift = load_int64(step[POSITIONS], token) * shape[ROTARY_DIM] * FLOAT_BYTES
    whole = shape[NORMS_WHOLE_HEADS]
    if whole:
        keys = first + heads * head_bytes
        rms_norm(first, q_norm, first, heads * head_dim, eps)
        rms_norm(keys, k_norm, keys, kv_heads * head_dim, eps)
    for head in range(heads + kv_heads):
        at = first + head * head_bytes
        norm = q_norm if head < heads else k_norm
        if norm and not whole:
            rms_norm(at, norm, at, head_dim, eps)
        if shape[TURNS_NEIGHBOURS]:
            rotate_neighbours(at, op[COS] + shift, op[SIN] + shift, shape[ROTARY_DIM])
        else:
            rotate(at, op[COS] + shift, op[SIN] + shift, shape[ROTARY_DIM])
    slot = load_int64(step[KV_SLOTS], token)
    page, offset = slot // page_size, slot % page_size
    for head in range(kv_heads):
        at = (page * kv_heads + head) * page_size * head_dim
        source = first + (heads + head) * head_bytes
        scatter(source, op[KEYS] + (at + offset) * FLOAT_BYTES, head_dim, page_size)
        scale_into(source + kv_heads * head_bytes, op[VALUES] + (at + offset * head_dim) * FLOAT_BYTES, head_dim, 1.0)


@njit(nogil=True)
def _attend(
    piece: int, op: Int64s, step: Int64s, shape: Int64s, scale: float, softcap: float, scratch: int, iota: int,
) -> None:  # fmt: skip
    work = step[PIECES] + piece // shape[KV_HEADS] * 32
    pages = step[PAGE_TABLE] + 4 * step[MAX_PAGES] * load_int64(work, 0)
    attend_piece(
        load_int64(work, 1), load_int64(work, 2), load_int64(work, 3), piece % shape[KV_HEADS], pages, op[X],
        shape[HEADS] + 2 * shape[KV_HEADS], op[Y], shape[HEADS], shape[KV_HEADS], shape[HEAD_DIM], op[KEYS],
        op[VALUES], shape[PAGE_SIZE], scale, softcap, op[EXTRA], 0, scratch, iota,
    )  # fmt: skip


@njit(nogil=True)
def _norm(x: int, out: int, token: int, op: Int64s, step: Int64s, shape: Int64s, norms: int, eps: float) -> None:
    """Of a token's whole row. WEIGHT is the norm's weight, EXTRA its bias, 0: none."""
    weight, bias = op[WEIGHT], op[EXTRA]
    own = _own_norm(token, norms, step)
    if own:
        weight = own
        if bias:
            bias = own + op[DEPTH] * FLOAT_BYTES
    if shape[CENTRES]:
        layer_norm(x, weight, bias, out, op[DEPTH], eps)
    else:
        rms_norm(x, weight, out, op[DEPTH], eps)


@Separate
def row_piece(
    kind: int, token: int, op: Int64s, step: Int64s, shape: Int64s, norms: int, other_norms: int, real: float,
    factor: float,
) -> None:  # fmt: skip
    """An operation on one token's row."""
    depth = op[DEPTH]
    if kind == EMBED:
        row, out = load_int64(step[TOKEN_IDS], token), op[Y] + token * depth * FLOAT_BYTES
        if op[STORAGE] == BLOCKS_8:
            widen_row(op[X] + row * (depth // BLOCK) * ROW_EIGHTS_BYTES, out, depth, np.float32(real))
        else:
            widen_into(op[STORAGE], op[X] + row * depth * element_bytes_of(op[STORAGE]), out, depth, real)
    elif kind == NORM:
        shift = token * depth * FLOAT_BYTES
        _norm(op[X] + shift, op[Y] + shift, token, op, step, shape, norms, real)
    elif kind == NORM_LAST:
        last = load_int64(step[LAST], token)
        source = op[X] + last * depth * FLOAT_BYTES
        _norm(source, op[Y] + token * depth * FLOAT_BYTES, last, op, step, shape, norms, real)
    elif kind == ROTATE:
        _rotate(token, op, step, shape, norms, other_norms, real)
    elif kind == JOIN:
        shift = token * depth * FLOAT_BYTES
        if op[WEIGHT]:
            _norm(op[X] + shift, op[X] + shift, token, op, step, shape, norms, real)
        add_scaled(op[X] + shift, op[Y] + shift, depth, factor)
    else:
        shift = token * depth * FLOAT_BYTES
        if shape[UNGATED]:
            gate(op[X] + shift, 0, op[Y] + shift, depth, shape[ACTIVATION])
        else:
            gates = op[X] + 2 * shift
            gate(gates, gates + depth * FLOAT_BYTES, op[Y] + shift, depth, shape[ACTIVATION])


@njit(nogil=True)
def _piece(
    piece: int, op: Int64s, reals: Floats, groups: Int64s, step: Int64s, shape: Int64s, scratch: int, iota: int,
) -> None:  # fmt: skip
    kind = op[KIND]
    if kind == LINEAR:
        _linear(piece, op, groups, step, scratch, iota)
    elif kind == EXPAND:
        _expand(piece, op, groups, step, iota)
    elif kind in (SET_ASIDE, ADD_KEPT):
        _keep(piece, op, groups, step)
    elif kind == ATTEND:
        _attend(piece, op, step, shape, reals[0], reals[1], scratch, iota)
    elif kind == HEAD:
        linear_piece(
            piece, step[NUM_LAST], op[X], op[DEPTH], op[Y], op[COLUMNS_OUT], op[WEIGHT], op[STORAGE], op[START],
            scratch, iota,
        )  # fmt: skip
    else:
        norms, other_norms = _norms_of(op[GROUP], groups, step), _norms_of(op[OTHER_GROUP], groups, step)
        rows = step[NUM_LAST] if kind == NORM_LAST else step[NUM_TOKENS]
        for token in range(piece * TOKENS_PER_PIECE, min(rows, (piece + 1) * TOKENS_PER_PIECE)):
            row_piece(
                kind, token, op.ctypes, step.ctypes, shape.ctypes, norms, other_norms, reals[0], reals[1],
            )  # fmt: skip


@kernel(
    "void(int64, int64[:, ::1], float64[:, ::1], int64[:, :, ::1], int64[::1], int64[::1], int64[:, :, ::1], int64, "
    "int64, int64)",
    parallel=True,
)
def run(
    parts: int, ops: Int64s, reals: Floats, groups: Int64s, step: Int64s, shape: Int64s, counters: Int64s,
    scratch: int, scratch_size: int, iota: int,
) -> None:  # fmt: skip
    """Each thread begins with a run of pieces of its own, so that it reads memory in order, and then helps the others.

    `counters` [ops, parts + 1, LINE / 8], at least: pieces claimed of each run, and pieces done; zero at the start.
    """
    for part in prange(parts):
        for i in range(ops.shape[0]):
            op = ops[i]
            pieces = _num_pieces(op, groups, step, shape)
            if not pieces:  # as of half of all where no row has an adapter: to claim nothing took 4 % of a fast step
                continue
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


def new_counters(num_ops: int, parts: int) -> Int64s:
    """What `run` counts with; to be zeroed before each run."""
    return np.zeros((num_ops, parts + 1, LINE // 8), np.int64)


def group_rows(groups: Sequence[GroupTable]) -> Int64s:
    """The modules of each group, as `run` reads them: [groups, modules, NUM_MODULE_FIELDS]."""
    rows = np.zeros((len(groups), max(len(group.modules) for group in groups), NUM_MODULE_FIELDS), np.int64)
    for own, group in zip(rows, groups, strict=True):
        for row, table, column in zip(own, group.modules, group.column_starts, strict=False):
            row[[INDEX, SCALES]] = table.host_index.ctypes.data, table.host_scale.ctypes.data
            row[[STORAGES, AFFINES]] = table.host_storage.ctypes.data, table.host_affine.ctypes.data
            row[[COLUMN, OUT_FEATURES]] = column, table.out_features
    return rows


def adapters_alone(groups: Sequence[GroupTable]) -> Int64s:
    """`ops` of shrink and expand of each group and nothing else: X and Y are left to be filled in."""
    ops = np.zeros((2 * len(groups), NUM_FIELDS), np.int64)
    for i, group in enumerate(groups):
        pair = ops[2 * i : 2 * i + 2]
        pair[:, [DEPTH, GROUP]] = group.in_features, i
        # A linear without base columns: its pieces are the shrinks alone.
        pair[0, [KIND, COLUMNS_OUT]] = LINEAR, 0
        pair[1, [KIND, COLUMNS_OUT]] = EXPAND, group.out_features
    return ops


def set_adapters(fields: Int64s, grouping: Grouping, u: Tensor, arena: Tensor) -> None:
    """The part of a step's fields that says which tokens have which adapter, and where the adapters lie."""
    fields[[NUM_ITEMS, U_WIDTH]] = grouping.num_items, grouping.max_width
    fields[[ORDER, ITEMS]] = grouping.order.ctypes.data, grouping.items.ctypes.data
    fields[[U, ARENA]] = u.data_ptr(), arena.data_ptr()
