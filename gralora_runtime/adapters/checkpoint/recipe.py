"""Where everything of a checkpoint goes: the same for all adapters that one training recipe made. Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from gralora_kernels.packing import Array, Place
from gralora_kernels.tables import Entry, Storage
from gralora_runtime.adapters.checkpoint.header import dtype_of_16_bits, pair_numel
from gralora_runtime.adapters.checkpoint.plan import ModulePlan, Plan
from gralora_runtime.adapters.checkpoint.remembered import remembered
from gralora_runtime.adapters.checkpoint.spec import EMBEDDINGS, ModuleShape
from gralora_runtime.adapters.checkpoint.tensors import DTYPES, TensorInfo

Layout = tuple[tuple[str, tuple[Entry, ...]], ...]  # per module: its name and its entries
# Per module that has some: its name, and where its gains begin, or an embedding's map.
Affines = tuple[tuple[str, int], ...]

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORAGES = {"F16": Storage.FLOAT16, "BF16": Storage.BFLOAT16}

# Bytes of the file that are one piece of work: enough that handing it over costs little beside it, and few enough that
# a step which runs on the same cores is kept up by a millisecond and no more.
PIECE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One tensor of the file, and where it goes."""

    name: str
    stored: TensorInfo
    is_a: bool
    experts: int  # whose matrices it has, to be placed one behind the other
    features: int  # inputs, or outputs, that are placed: the tensor may have added tokens' behind them
    offset: int  # of the blob, in its elements
    dtype: torch.dtype  # as the blob holds it

    @property
    def num_bytes(self) -> int:
        return self.stored.end - self.stored.begin

    @property
    def is_cut(self) -> bool:
        """Not all of the tensor is placed. Then it is a plain one."""
        return len(self.stored.shape) == 2 and self.experts == 1 and self.features != self.stored.shape[self.is_a]

    @property
    def numel(self) -> int:
        """That are placed."""
        return self.features * self.stored.shape[not self.is_a] if self.is_cut else self.stored.numel


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Neighbours in the file, which are read and packed at once."""

    begin: int  # bytes of the file
    end: int
    matrices: tuple[Matrix, ...]  # from the file's front to its end
    positions: Array = field(compare=False)  # of the matrices in their recipe
    spans: Array = field(compare=False)  # bytes of the piece, [matrices, 2]: see `HashMany`
    # See `PlaceMany`; None if a matrix has to become another dtype or is cut, they have several, or some are many
    # experts'.
    places: Array | None = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsPlace:
    """Where rows go that stand in the place of a module's: an embedding's behind their map, which lies at `a_offset`;
    an output head's as a pair."""

    module: ModuleShape
    rank: int  # of the pair
    a_offset: int
    b_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A blob has first all A, then all B, in the order of modules: what one kernel reads of a projection group lies
    side by side. Then come gains and shifts, and rows."""

    layout: Layout
    affines: Affines
    rows: tuple[RowsPlace, ...]
    numel: int  # of the blob
    matrices: tuple[Matrix, ...]  # A before B, in the order of modules
    pieces: tuple[Piece, ...]  # from the file's front to its end
    gaps: tuple[tuple[int, int], ...]  # bytes of the blob [begin, end) that belong to no matrix
    description: bytes  # see `describe`


def recipe_of(
    plan: Plan,
    tensors: Mapping[str, TensorInfo],
    dtype: torch.dtype,
    *,
    keeps_16_bit: bool,
    piece_bytes: int = PIECE_BYTES,
) -> Recipe:
    """For a checkpoint that follows its plan, and a pool of `dtype`."""
    return _recipe(tensors, plan, dtype, keeps_16_bit, piece_bytes)


def describe(plan: Plan, tensors: Mapping[str, TensorInfo]) -> bytes:
    """What an adapter's digest covers beside its weights. Names of tensors, dialects and training settings leave no
    trace in it."""
    layers = [
        (module.module.name, module.module.in_features, module.module.out_features, pair.part.r, pair.part.k,
         float(pair.part.scale).hex(), pair.a_shape, pair.b_shape,
         (tensors[pair.a_name].dtype, tensors[pair.b_name].dtype))
        for module in plan
        for pair in module.parts
    ]  # fmt: skip
    vectors = [
        (module.module.name, module.module.out_features, vector.kind, tensors[vector.name].dtype)
        for module in plan
        for vector in module.vectors
    ]
    rows = [
        (module.module.name, module.module.kind, module.rows.shape, module.rows.tokens, tensors[module.rows.name].dtype)
        for module in plan
        if module.rows
    ]
    return json.dumps([*layers, *vectors, *rows]).encode()


@remembered
def _recipe(
    tensors: Mapping[str, TensorInfo], plan: Plan, dtype: torch.dtype, keeps_16_bit: bool, piece_bytes: int
) -> Recipe:
    pairs = [pair for module in plan for pair in module.parts]
    sizes = [pair_numel(tensors, pair, keeps_16_bit=keeps_16_bit) for pair in pairs]
    a_offset, b_offset = 0, sum(a_numel for a_numel, _ in sizes)
    numels = iter(sizes)
    layout: dict[str, list[Entry]] = {}
    matrices: list[Matrix] = []
    for module in plan:
        entries = layout[module.module.name] = []
        for pair in module.parts:
            kept = dtype_of_16_bits(tensors, pair) if keeps_16_bit else None
            held = TORCH_DTYPES[kept] if kept else dtype
            for is_a, name, offset, features in (
                (True, pair.a_name, a_offset, pair.features[0]),
                (False, pair.b_name, b_offset, pair.features[1]),
            ):
                matrices.append(
                    Matrix(
                        name=name,
                        stored=tensors[name],
                        is_a=is_a,
                        experts=pair.experts,
                        features=features,
                        offset=offset,
                        dtype=held,
                    )
                )
            entries.append(
                Entry(
                    a_offset=a_offset,
                    b_offset=b_offset,
                    r=pair.part.r,
                    k=pair.part.k,
                    scale=pair.part.scale,
                    storage=STORAGES[kept] if kept else Storage.NATIVE,
                )
            )
            a_numel, b_numel = next(numels)
            a_offset += a_numel
            b_offset += b_numel
    affines, rows, numel = _behind(plan, b_offset, dtype)
    for place in rows:
        if place.module.kind not in EMBEDDINGS:
            own = Entry(a_offset=place.a_offset, b_offset=place.b_offset, r=place.rank, k=1, scale=1.0)
            layout[place.module.name].append(own)
    return Recipe(
        layout=tuple((name, tuple(entries)) for name, entries in layout.items()),
        affines=tuple(affines),
        rows=tuple(rows),
        numel=numel,
        matrices=tuple(matrices),
        pieces=tuple(_piece(matrices, part, dtype) for part in _cut(matrices, piece_bytes)),
        gaps=tuple(_gaps(matrices, numel * dtype.itemsize, dtype)),
        description=describe(plan, tensors),
    )


def _behind(
    plan: Sequence[ModulePlan], numel: int, dtype: torch.dtype
) -> tuple[list[tuple[str, int]], list[RowsPlace], int]:
    """What comes behind `numel` elements of matrices, and where it ends."""
    affines: list[tuple[str, int]] = []
    rows: list[RowsPlace] = []
    for module in plan:
        extra, (a_numel, b_numel) = module.extra_numel(dtype.itemsize), module.rows_pair_numel()
        if extra:
            affines.append((module.module.name, numel))
        if module.rows:
            a_offset = numel if module.module.kind in EMBEDDINGS else numel + extra
            place = RowsPlace(
                module=module.module, rank=module.rows_rank, a_offset=a_offset, b_offset=a_offset + a_numel
            )
            rows.append(place)
        numel += extra + a_numel + b_numel
    return affines, rows, numel


def _gaps(matrices: Sequence[Matrix], blob_bytes: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    end = 0
    for matrix in sorted(matrices, key=lambda matrix: matrix.offset):
        begin = matrix.offset * dtype.itemsize
        if end < begin:
            yield end, begin
        end = begin + matrix.numel * matrix.dtype.itemsize
    if end < blob_bytes:
        yield end, blob_bytes


def _cut(matrices: Sequence[Matrix], piece_bytes: int) -> Iterator[list[int]]:
    """Positions of neighbours in the file, together `piece_bytes` or a little more."""
    part: list[int] = []
    num_bytes = 0
    stored = [(matrix.stored.begin, matrix.stored.end) for matrix in matrices]
    for position in sorted(range(len(matrices)), key=stored.__getitem__):
        part.append(position)
        num_bytes += matrices[position].num_bytes
        if num_bytes >= piece_bytes:
            yield part
            part, num_bytes = [], 0
    if part:
        yield part


def _piece(matrices: Sequence[Matrix], positions: Sequence[int], dtype: torch.dtype) -> Piece:
    """For a blob of `dtype`."""
    own = tuple(matrices[position] for position in positions)
    begin = own[0].stored.begin
    stay = all(matrix.dtype == TORCH_DTYPES[matrix.stored.dtype] for matrix in own)
    one_dtype = len({matrix.stored.dtype for matrix in own}) == 1
    one_each = all(matrix.experts == 1 and not matrix.is_cut for matrix in own)
    return Piece(
        begin=begin,
        end=own[-1].stored.end,
        matrices=own,
        positions=np.array(positions),
        spans=np.array([(matrix.stored.begin, matrix.stored.end) for matrix in own]) - begin,
        places=np.array([_place(matrix, begin, dtype) for matrix in own]) if stay and one_dtype and one_each else None,
    )


def _place(matrix: Matrix, begin: int, dtype: torch.dtype) -> list[int]:
    """A row of `PlaceMany`'s table."""
    shape = matrix.stored.shape
    is_transposed = len(shape) == 2
    k, depth, columns = (1, shape[1], shape[0]) if is_transposed else shape
    place = {
        Place.SOURCE: (matrix.stored.begin - begin) // DTYPES[matrix.stored.dtype],
        Place.TARGET: matrix.offset * dtype.itemsize // matrix.dtype.itemsize,
        Place.BLOCKS: k,
        Place.DEPTH: depth,
        Place.COLUMNS: columns,
        Place.IS_TRANSPOSED: int(is_transposed),
    }
    return [place[column] for column in Place]
