"""A model's whole forward pass as one list of operations (`operations.py`), and the buffers between them."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from numba import get_num_threads
from torch import Tensor

from gralora_kernels.cpu import operations
from gralora_kernels.cpu.adapters import SCRATCH_BYTES
from gralora_kernels.cpu.attention import attention_rows, scratch_bytes
from gralora_kernels.cpu.blocks import BLOCKS_8, pack_rows, recognised
from gralora_kernels.cpu.linear import (
    DTYPES,
    FP32_BITS,
    ROW_BLOCK_OF_BLOCKS,
    SCRATCH_GAP,
    WIDE_BYTES,
    PackedWeight,
    row_numbers,
    storage_of,
)
from gralora_kernels.cpu.microkernel import FROM_OUTPUT, FROM_ZERO
from gralora_kernels.cpu.operations import (
    ACTIVATION,
    ADD_KEPT,
    ATTEND,
    CENTRES,
    EMBED,
    EXPAND,
    GATE,
    GROUP,
    HAS_AFFINE,
    HEAD,
    HEAD_DIM,
    HEADS,
    JOIN,
    KV_HEADS,
    KV_SLOTS,
    LAST,
    LINEAR,
    MAX_PAGES,
    NO_GROUP,
    NORM,
    NORM_LAST,
    NORMS_WHOLE_HEADS,
    NUM_ATTENTION,
    NUM_FIELDS,
    NUM_LAST,
    NUM_SHAPE_FIELDS,
    NUM_STEP_FIELDS,
    NUM_TOKENS,
    OTHER_GROUP,
    PAGE_SIZE,
    PAGE_TABLE,
    PIECES,
    POSITIONS,
    ROTARY_DIM,
    ROTATE,
    SET_ASIDE,
    TOKEN_IDS,
    TOKEN_SLOTS,
    TURNS_NEIGHBOURS,
    UNGATED,
    Y,
    group_rows,
    new_counters,
    set_adapters,
)
from gralora_kernels.cpu.packed_rows import PackedRows
from gralora_kernels.cpu.simd import LANES
from gralora_kernels.cpu.team import LINE
from gralora_kernels.cpu.threads import region_lock
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import GroupTable, Storage

Int64s = npt.NDArray[np.int64]
NOTHING: Mapping[str, Tensor | int] = MappingProxyType({})
# Which field STORAGE is of.
STORED = {EMBED: "X"} | dict.fromkeys((LINEAR, EXPAND, SET_ASIDE, ADD_KEPT, HEAD), "WEIGHT")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """What is the same for all layers.

    `norms_whole_heads`: a norm of queries or keys is of all heads together; `turns_neighbours`: of the dimensions that
    rotate together one is beside the other, not half of them away; `centres`: norms subtract the mean; `is_gated`: half
    of what the first product of a feed-forward block gives are gates.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    activation: int
    rotary_dim: int
    norms_whole_heads: bool = False
    turns_neighbours: bool = False
    centres: bool = False
    is_gated: bool = True


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
    token_slots: npt.NDArray[np.int32]  # [tokens]: -1: none


@dataclass(frozen=True, slots=True)
class RowNorm:
    """Of a row: its weight, its bias if it has one, and the group in which adapters have theirs."""

    weight: Tensor
    bias: Tensor | None
    group: GroupTable


class Program:
    """The operations of one model, in order. Holds the buffers between them, so calls to `run` take turns."""

    def __init__(self, shape: DecoderShape, *, max_tokens: int, arena: Tensor) -> None:
        attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.hidden = torch.zeros(max_tokens, shape.hidden)
        self.normed = torch.zeros(max_tokens, shape.hidden)
        self.joining = torch.zeros(max_tokens, shape.hidden)
        self.qkv = torch.zeros(max_tokens, attention)
        self.attended = torch.zeros(max_tokens, shape.heads * shape.head_dim)
        self.gates_and_ups = torch.zeros(max_tokens, (1 + shape.is_gated) * shape.intermediate)
        self.gated = torch.zeros(max_tokens, shape.intermediate)
        self._arena = arena
        self._u = torch.zeros(0)
        self.weight_bytes = 0
        self._kept: list[object] = []  # operations hold addresses: what lies there must stay
        self._ops: list[list[int]] = []
        self._reals: list[tuple[float, float]] = []
        self._groups: list[GroupTable] = []
        self._shape = np.zeros(NUM_SHAPE_FIELDS, np.int64)
        self._shape[[HEADS, KV_HEADS]] = shape.heads, shape.kv_heads
        self._shape[[HEAD_DIM, PAGE_SIZE]] = shape.head_dim, shape.page_size
        self._shape[[ROTARY_DIM, NORMS_WHOLE_HEADS]] = shape.rotary_dim, shape.norms_whole_heads
        self._shape[[TURNS_NEIGHBOURS, CENTRES]] = shape.turns_neighbours, shape.centres
        self._shape[[UNGATED, ACTIVATION]] = not shape.is_gated, shape.activation
        attend_scratch = scratch_bytes(shape.heads // shape.kv_heads, shape.head_dim, shape.page_size)
        self._scratch_size = -(-max(attend_scratch, SCRATCH_BYTES, WIDE_BYTES) // LINE) * LINE + SCRATCH_GAP
        self._parts = get_num_threads()
        # Of a step's tokens, of a product's rows, of a piece's queries.
        self._iota = row_numbers(max(max_tokens, ROW_BLOCK_OF_BLOCKS, attention_rows(shape.heads // shape.kv_heads)))
        self._scratch = torch.zeros(self._parts * self._scratch_size, dtype=torch.uint8)

    def embed(self, table: Tensor, factor: float, *, least_bits: int = FP32_BITS // 2) -> Tensor | PackedRows:
        """hidden = factor * table[token]. `least_bits`: see `PackedWeight`. Returns how the table is kept."""
        is_whole = table.shape[1] % LANES == 0  # vectors
        storage: int = storage_of(table) if least_bits < FP32_BITS and is_whole else Storage.NATIVE
        blocks = recognised(table) if least_bits < FP32_BITS // 2 and storage == Storage.NATIVE else None
        if blocks is not None and blocks.kind == BLOCKS_8:
            storage, kept = BLOCKS_8, pack_rows(blocks)
        else:
            kept = table.to(DTYPES[storage])
        self.weight_bytes += kept.nbytes
        self._add(EMBED, kept, self.hidden, table.shape[1], STORAGE=int(storage), real=factor)
        return PackedRows(kept) if storage == BLOCKS_8 else kept

    def norm(self, norm: RowNorm, eps: float) -> None:
        """normed = norm of hidden."""
        self._add(NORM, self.hidden, self.normed, self.hidden.shape[1], real=eps, also=self._norm_fields(norm))

    def linear(
        self, x: Tensor, y: Tensor, weight: PackedWeight, group: GroupTable, *, bias: Tensor | None = None,
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        """y = x @ weight.T + bias, or y += x @ weight.T; then what the adapters of `group` make of it."""
        assert not (accumulate and bias is not None), "sums begin at one of the two"
        start = FROM_OUTPUT if accumulate else FROM_ZERO if bias is None else bias
        place = self._place_of(group)
        self._keep(weight)
        # Gains are for the product alone: where its sums begin at the stream, `joining` holds the stream meanwhile.
        for kind in (SET_ASIDE, LINEAR, EXPAND, ADD_KEPT) if accumulate else (LINEAR, EXPAND):
            self._add(
                kind, x, y, weight.in_features, WEIGHT=weight.panels, STORAGE=int(weight.storage),
                COLUMNS_OUT=weight.out_features, START=start, GROUP=place, EXTRA=self.joining,
            )  # fmt: skip

    def join(self, norm: RowNorm | None, factor: float, eps: float) -> None:
        """hidden += factor * joining, or factor * norm of joining."""
        fields = {} if norm is None else self._norm_fields(norm)
        self._add(JOIN, self.joining, self.hidden, self.hidden.shape[1], real=eps, factor=factor, also=fields)

    def attend(
        self, keys: Tensor, values: Tensor, *, rotary: tuple[Tensor, Tensor], scale: float, softcap: float,
        window: int, q_norm: RowNorm | None, k_norm: RowNorm | None, eps: float,
    ) -> None:  # fmt: skip
        """qkv -> attended, by way of this layer's pages; softcap 0 and window 0: no limit. `rotary`: cosines and sines
        [positions, rotary_dim].
        """
        cos, sin = rotary
        fields: dict[str, Tensor | int] = {}
        for norm, weight, group in ((q_norm, "WEIGHT", "GROUP"), (k_norm, "EXTRA", "OTHER_GROUP")):
            if norm is not None:
                fields |= {weight: norm.weight, group: self._place_of(norm.group)}
        self._add(ROTATE, self.qkv, self.attended, 0, real=eps, also=fields, COS=cos, SIN=sin, KEYS=keys, VALUES=values)
        self._add(
            ATTEND, self.qkv, self.attended, 0, real=scale, factor=softcap, KEYS=keys, VALUES=values, EXTRA=window
        )

    def gate(self) -> None:
        """gates_and_ups -> gated."""
        self._add(GATE, self.gates_and_ups, self.gated, self.gated.shape[1])

    def norm_last(self, norm: RowNorm, eps: float) -> None:
        """normed = norm of hidden, of the last tokens."""
        self._add(NORM_LAST, self.hidden, self.normed, self.hidden.shape[1], real=eps, also=self._norm_fields(norm))

    def head(self, weight: PackedWeight, bias: Tensor | None) -> None:
        """The logits of the last tokens, of which `normed` is: `run` says where they go."""
        self._vocab_size = weight.out_features
        self._add(
            HEAD, self.normed, 0, weight.in_features, WEIGHT=weight.panels, STORAGE=int(weight.storage),
            COLUMNS_OUT=weight.out_features, START=FROM_ZERO if bias is None else bias,
        )  # fmt: skip
        self._keep(weight)
        self._table = np.array(self._ops, np.int64)
        self._factors = np.array(self._reals, np.float64)
        self._group_rows = group_rows(self._groups)
        self._affines = list(
            {id(affine): affine for affine in (group.rows.all_affine for group in self._groups)}.values()
        )
        self._counters = new_counters(len(self._ops), self._parts)

    def run(self, step: Step, embedded: Callable[[Tensor], None] | None = None) -> Tensor:
        """Logits [len(step.last), vocab]. `embedded` may change hidden [tokens, hidden] once it is the embedding's."""
        logits = torch.empty(len(step.last), self._vocab_size)
        self._table[-1, Y] = logits.data_ptr()
        self._counters.fill(0)
        fields = self._step_fields(step)
        if embedded is None:
            self._run(slice(None), fields)
        else:
            self._run(slice(0, 1), fields)
            embedded(self.hidden[: len(step.token_ids)])
            self._run(slice(1, None), fields)
        return logits

    def _run(self, part: slice, fields: Int64s) -> None:
        """A part of the operations."""
        with region_lock:
            operations.run(
                self._parts, self._table[part], self._factors[part], self._group_rows, fields, self._shape,
                self._counters[part], self._scratch.data_ptr(), self._scratch_size, self._iota,
            )  # fmt: skip

    def _step_fields(self, step: Step) -> Int64s:
        grouping = step.grouping
        columns = grouping.num_adapted * self._group_rows.shape[1] * grouping.max_width
        if self._u.numel() < columns:
            self._u = torch.zeros(columns)
        fields = np.zeros(NUM_STEP_FIELDS, np.int64)
        set_adapters(fields, grouping, self._u, self._arena)
        fields[HAS_AFFINE] = any(affines[:, grouping.slots].any() for affines in self._affines)
        fields[[NUM_TOKENS, NUM_LAST]] = len(step.token_ids), len(step.last)
        fields[[NUM_ATTENTION, PIECES]] = len(step.pieces), step.pieces.ctypes.data
        fields[TOKEN_SLOTS] = step.token_slots.ctypes.data
        fields[[TOKEN_IDS, POSITIONS]] = step.token_ids.data_ptr(), step.positions.data_ptr()
        fields[[KV_SLOTS, LAST]] = step.kv_slots.data_ptr(), step.last.data_ptr()
        fields[[MAX_PAGES, PAGE_TABLE]] = step.page_table.shape[1], step.page_table.data_ptr()
        return fields

    def _norm_fields(self, norm: RowNorm) -> dict[str, Tensor | int]:
        fields: dict[str, Tensor | int] = {"WEIGHT": norm.weight, "GROUP": self._place_of(norm.group)}
        return fields if norm.bias is None else fields | {"EXTRA": norm.bias}

    def _place_of(self, group: GroupTable) -> int:
        self._groups.append(group)
        return len(self._groups) - 1

    def _keep(self, weight: PackedWeight) -> None:
        self.weight_bytes += weight.panels.nbytes
        self._kept.append(weight)

    def _add(
        self, kind: int, x: Tensor, y: Tensor | int, depth: int, *, real: float = 0.0, factor: float = 0.0,
        also: Mapping[str, Tensor | int] = NOTHING, **fields: Tensor | int,
    ) -> None:  # fmt: skip
        row = [0] * NUM_FIELDS
        row[GROUP] = row[OTHER_GROUP] = NO_GROUP
        storage = fields.get("STORAGE", Storage.NATIVE)
        assert isinstance(storage, int), storage
        for name, value in {"KIND": kind, "X": x, "Y": y, "DEPTH": depth, **fields, **also}.items():
            if isinstance(value, Tensor):
                _check(name, value, DTYPES[storage] if name == STORED.get(kind) else torch.float32)
                self._kept.append(value)
            row[getattr(operations, name)] = value.data_ptr() if isinstance(value, Tensor) else value
        self._ops.append(row)
        self._reals.append((real, factor))


def _check(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """The program reads raw addresses."""
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous {dtype}, got {tensor.dtype} with strides {tensor.stride()}")
