"""A model's whole forward pass as one list of operations (`operations.py`), and the buffers between them."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numba import get_num_threads
from torch import Tensor

from gralora_kernels.cpu import operations
from gralora_kernels.cpu.adapters import SCRATCH_BYTES
from gralora_kernels.cpu.attention import attention_rows, scratch_bytes
from gralora_kernels.cpu.blocks import BLOCKS_8, pack_rows, recognised
from gralora_kernels.cpu.linear import DTYPES, FP32_BITS, ROW_BLOCK, WIDE_BYTES, PackedWeight, row_numbers, storage_of
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
    NORM,
    NORM_LAST,
    NORMS_WHOLE_HEADS,
    NUM_ATTENTION,
    NUM_FIELDS,
    NUM_LAST,
    NUM_SHAPE_FIELDS,
    NUM_STEP_FIELDS,
    NUM_TOKENS,
    PAGE_SIZE,
    PAGE_TABLE,
    PIECES,
    POSITIONS,
    ROTARY_DIM,
    ROTATE,
    SET_ASIDE,
    TOKEN_IDS,
    TURNS_NEIGHBOURS,
    UNGATED,
    Y,
    group_rows,
    new_counters,
    set_adapters,
)
from gralora_kernels.cpu.simd import LANES
from gralora_kernels.cpu.team import LINE
from gralora_kernels.cpu.threads import region_lock
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import GroupTable, Storage

Int64s = npt.NDArray[np.int64]
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
        self._scratch_size = -(-max(attend_scratch, SCRATCH_BYTES, WIDE_BYTES) // LINE) * LINE
        self._parts = get_num_threads()
        # Of a step's tokens, of a product's rows, of a piece's queries.
        self._iota = row_numbers(max(max_tokens, ROW_BLOCK, attention_rows(shape.heads // shape.kv_heads)))
        self._scratch = torch.zeros(self._parts * self._scratch_size, dtype=torch.uint8)

    def embed(self, table: Tensor, factor: float, *, least_bits: int = FP32_BITS // 2) -> None:
        """hidden = factor * table[token]. `least_bits`: see `PackedWeight`."""
        is_whole = table.shape[1] % LANES == 0  # vectors
        storage: int = storage_of(table) if least_bits < FP32_BITS and is_whole else Storage.NATIVE
        blocks = recognised(table) if least_bits < FP32_BITS // 2 and storage == Storage.NATIVE else None
        if blocks is not None and blocks.kind == BLOCKS_8:
            storage, kept = BLOCKS_8, pack_rows(blocks)
        else:
            kept = table.to(DTYPES[storage])
        self.weight_bytes += kept.nbytes
        self._add(EMBED, kept, self.hidden, table.shape[1], STORAGE=int(storage), real=factor)

    def norm(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        """normed = norm of hidden."""
        self._add(NORM, self.hidden, self.normed, len(weight), WEIGHT=weight, EXTRA=_or_none(bias), real=eps)

    def linear(
        self, x: Tensor, y: Tensor, weight: PackedWeight, group: GroupTable, *, bias: Tensor | None = None,
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        """y = x @ weight.T + bias, or y += x @ weight.T; then what the adapters of `group` make of it."""
        assert not (accumulate and bias is not None), "sums begin at one of the two"
        start = FROM_OUTPUT if accumulate else FROM_ZERO if bias is None else bias
        self._groups.append(group)
        self._keep(weight)
        # Gains are for the product alone: where its sums begin at the stream, `joining` holds the stream meanwhile.
        for kind in (SET_ASIDE, LINEAR, EXPAND, ADD_KEPT) if accumulate else (LINEAR, EXPAND):
            self._add(
                kind, x, y, weight.in_features, WEIGHT=weight.panels, STORAGE=int(weight.storage),
                COLUMNS_OUT=weight.out_features, START=start, GROUP=len(self._groups) - 1, EXTRA=self.joining,
            )  # fmt: skip

    def join(self, norm: Tensor | None, bias: Tensor | None, factor: float, eps: float) -> None:
        """hidden += factor * joining, or factor * norm of joining."""
        self._add(
            JOIN, self.joining, self.hidden, self.hidden.shape[1], WEIGHT=_or_none(norm), EXTRA=_or_none(bias),
            real=eps, factor=factor,
        )  # fmt: skip

    def attend(
        self, keys: Tensor, values: Tensor, *, rotary: tuple[Tensor, Tensor], scale: float, softcap: float,
        window: int, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
    ) -> None:  # fmt: skip
        """qkv -> attended, by way of this layer's pages; softcap 0 and window 0: no limit. `rotary`: cosines and sines
        [positions, rotary_dim].
        """
        cos, sin = rotary
        self._add(
            ROTATE, self.qkv, self.attended, 0, real=eps, COS=cos, SIN=sin, KEYS=keys, VALUES=values,
            WEIGHT=_or_none(q_norm), EXTRA=_or_none(k_norm),
        )  # fmt: skip
        self._add(
            ATTEND, self.qkv, self.attended, 0, real=scale, factor=softcap, KEYS=keys, VALUES=values, EXTRA=window
        )

    def gate(self) -> None:
        """gates_and_ups -> gated."""
        self._add(GATE, self.gates_and_ups, self.gated, self.gated.shape[1])

    def norm_last(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        """normed = norm of hidden, of the last tokens."""
        self._add(NORM_LAST, self.hidden, self.normed, len(weight), WEIGHT=weight, EXTRA=_or_none(bias), real=eps)

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

    def run(self, step: Step) -> Tensor:
        """Logits [len(step.last), vocab]."""
        logits = torch.empty(len(step.last), self._vocab_size)
        self._table[-1, Y] = logits.data_ptr()
        self._counters.fill(0)
        with region_lock:
            operations.run(
                self._parts, self._table, self._factors, self._group_rows, self._step_fields(step), self._shape,
                self._counters, self._scratch.data_ptr(), self._scratch_size, self._iota,
            )  # fmt: skip
        return logits

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
        fields[[TOKEN_IDS, POSITIONS]] = step.token_ids.data_ptr(), step.positions.data_ptr()
        fields[[KV_SLOTS, LAST]] = step.kv_slots.data_ptr(), step.last.data_ptr()
        fields[[MAX_PAGES, PAGE_TABLE]] = step.page_table.shape[1], step.page_table.data_ptr()
        return fields

    def _keep(self, weight: PackedWeight) -> None:
        self.weight_bytes += weight.panels.nbytes
        self._kept.append(weight)

    def _add(
        self, kind: int, x: Tensor, y: Tensor | int, depth: int, *, real: float = 0.0, factor: float = 0.0,
        **fields: Tensor | int,
    ) -> None:  # fmt: skip
        row = [0] * NUM_FIELDS
        row[GROUP] = -1
        storage = fields.get("STORAGE", Storage.NATIVE)
        assert isinstance(storage, int), storage
        for name, value in {"KIND": kind, "X": x, "Y": y, "DEPTH": depth, **fields}.items():
            if isinstance(value, Tensor):
                _check(name, value, DTYPES[storage] if name == STORED.get(kind) else torch.float32)
                self._kept.append(value)
            row[getattr(operations, name)] = value.data_ptr() if isinstance(value, Tensor) else value
        self._ops.append(row)
        self._reals.append((real, factor))


def _or_none(tensor: Tensor | None) -> Tensor | int:
    """Address 0 is none."""
    return 0 if tensor is None else tensor


def _check(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """The program reads raw addresses."""
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous {dtype}, got {tensor.dtype} with strides {tensor.stride()}")
