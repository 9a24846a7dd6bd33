"""Rows of an embedding, or of an output head, that stand in the place of the base model's. Knows blobs, and no config.

An embedding's are looked up: before them lies a map, which row each token has (0: the base model's, else 1 + row). An
output head's are a low-rank pair like any other: what they differ by from the base model's, and which outputs they are.
With W' - W as B, and every input as it is for A, that holds for all of them at once, too. Added tokens' are the same
kinds of rows of modules apart (`added_shapes`): those of a head are its A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gralora_kernels.alignment import map_numel
from gralora_kernels.packing import Array, place_a, place_b
from gralora_runtime.adapters.checkpoint.affine import BaseLayers
from gralora_runtime.adapters.checkpoint.bounds import largest_magnitude
from gralora_runtime.adapters.checkpoint.plan import ModulePlan, RowsTensor
from gralora_runtime.adapters.checkpoint.recipe import RowsPlace
from gralora_runtime.adapters.checkpoint.spec import LayerKind
from gralora_runtime.adapters.checkpoint.stored import ARRAYS, held, read_range
from gralora_runtime.adapters.checkpoint.tensors import DTYPES, TensorInfo

PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Cells:
    """A blob that is being filled."""

    values: Array  # flat; 16 bits as bits
    dtype: torch.dtype
    panel: int  # see `Packing`


@dataclass(frozen=True, slots=True)
class RowsFile:
    """Rows as a checkpoint's file has them."""

    file: int
    tensor: RowsTensor
    tensors: Mapping[str, TensorInfo]

    @property
    def stored(self) -> TensorInfo:
        return self.tensors[self.tensor.name]

    def read(self, first: int, count: int) -> Array:
        """fp32 [count, hidden]. Raises MalformedError, or ValueError for what is no finite number."""
        values = self._bytes(first, count).view(ARRAYS[self.stored.dtype])
        if largest_magnitude(values, self.stored.dtype) > torch.finfo(torch.float32).max:
            raise ValueError(f"tensor {self.tensor.name} has values that are not finite in float32")
        return held(values, self.stored.dtype, torch.float32).reshape(count, -1)

    def digest(self) -> bytes:
        """SHA-256 of its bytes."""
        digest = hashlib.sha256()
        for first, count in self.pieces():
            digest.update(self._bytes(first, count).data)
        return digest.digest()

    def pieces(self) -> Iterator[tuple[int, int]]:
        """First row of the tensor and number of each."""
        return pieces_of(*self.tensor.shape)

    def added(self) -> Array:
        """Added tokens' rows, with all that was trained of them: fp32 [count, hidden]. Raises as `read` does."""
        tensor = self.tensor
        rows = self.read(tensor.first, tensor.count).astype(np.float64)
        if tensor.pair is not None:
            a, b = (self._matrix(name) for name in (tensor.pair.a_name, tensor.pair.b_name))
            # An embedding's tokens are the inputs of its pair, a head's the outputs.
            is_embedding = a.shape[1] > tensor.pair.features[0]
            rows += tensor.pair.part.scale * (a[:, tensor.first :].T @ b.T if is_embedding else b[tensor.first :] @ a)
        if tensor.trained is not None:
            own = RowsFile(self.file, tensor.trained, self.tensors)
            for at, token in enumerate(tensor.trained.tokens or ()):
                if token >= tensor.first:
                    rows[token - tensor.first] = own.read(at, 1)[0]
        return rows.astype(np.float32)

    def _matrix(self, name: str) -> Array:
        """float64."""
        stored = self.tensors[name]
        values = read_range(self.file, stored.begin, stored.end).view(ARRAYS[stored.dtype])
        return held(values, stored.dtype, torch.float32).reshape(stored.shape).astype(np.float64)

    def _bytes(self, first: int, count: int) -> Array:
        row_bytes = self.tensor.shape[1] * DTYPES[self.stored.dtype]
        begin = self.stored.begin + first * row_bytes
        return read_range(self.file, begin, begin + count * row_bytes)


def rows_in(file: int, plan: Sequence[ModulePlan], tensors: Mapping[str, TensorInfo]) -> dict[str, RowsFile]:
    """By module."""
    return {module.module.name: RowsFile(file, module.rows, tensors) for module in plan if module.rows}


def put_rows(cells: Cells, places: Sequence[RowsPlace], rows: Mapping[str, RowsFile], base: BaseLayers) -> None:
    """Raises MalformedError if the file is not what it was, ValueError for what is no finite number."""
    for place in places:
        _PUT[place.module.kind](cells, place, rows[place.module.name], base)


def pieces_of(count: int, width: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Of `count` rows of `width` numbers: first row and number of rows of each piece."""
    at_once = max(1, PIECE_BYTES // (4 * width * multiple)) * multiple
    for first in range(0, count, at_once):
        yield first, min(at_once, count - first)


def _put_embedding(cells: Cells, place: RowsPlace, rows: RowsFile, _: BaseLayers) -> None:
    module = place.module
    row_of: Array = np.zeros(module.in_features, np.int32)
    tokens = rows.tensor.tokens
    for row, token in enumerate(range(module.in_features) if tokens is None else tokens):
        if token < module.in_features:  # others were added
            row_of[token] = 1 + row
    start = _put_map(cells, place, row_of)
    for first, count in rows.pieces():
        begin, numel = start + first * module.out_features, count * module.out_features
        cells.values[begin : begin + numel] = _as_cells(rows.read(first, count), cells.dtype)


def _put_added_embedding(cells: Cells, place: RowsPlace, rows: RowsFile, _: BaseLayers) -> None:
    """Input 0 has no row: it is any token of the base model."""
    row_of: Array = np.zeros(place.module.in_features, np.int32)
    row_of[1 : 1 + rows.tensor.count] = 1 + np.arange(rows.tensor.count)
    start, own = _put_map(cells, place, row_of), _as_cells(rows.added(), cells.dtype)
    cells.values[start : start + own.size] = own


def _put_map(cells: Cells, place: RowsPlace, row_of: Array) -> int:
    """Returns where rows begin."""
    cells.values[place.a_offset :].view(np.uint8)[: row_of.nbytes] = row_of.view(np.uint8)
    return place.a_offset + map_numel(place.module.in_features, cells.dtype.itemsize)


def _put_added_head(cells: Cells, place: RowsPlace, rows: RowsFile, _: BaseLayers) -> None:
    """A: the rows. B: output i is that of the i-th."""
    module, rank = place.module, place.rank
    columns = np.ascontiguousarray(rows.added().T)  # [in, rank]
    a = cells.values[place.a_offset :][: rank * module.in_features]
    place_a(a, _as_cells(columns, cells.dtype).reshape(1, *columns.shape), cells.panel)
    _put_outputs(cells, place, 0, np.eye(module.out_features, rank, dtype=np.float32))


def _put_head(cells: Cells, place: RowsPlace, rows: RowsFile, base: BaseLayers) -> None:
    tokens = rows.tensor.tokens
    if tokens is not None and place.rank == len(tokens):
        _put_few(cells, place, tokens, rows.read(0, len(tokens)), base)
        return
    module, rank = place.module, place.rank
    a = cells.values[place.a_offset :][: rank * module.in_features]
    place_a(a, _as_cells(np.eye(rank, dtype=np.float32), cells.dtype).reshape(1, rank, rank), cells.panel)
    for first, count in pieces_of(module.out_features, module.in_features, cells.panel or 1):
        change = np.zeros((count, module.in_features), np.float32)
        if tokens is None:
            change += rows.read(first, count) - base.rows(module.name, first, count)
        else:
            for at, token in enumerate(tokens):
                if first <= token < first + count:
                    change[token - first] = rows.read(at, 1)[0] - base.rows(module.name, token, 1)[0]
        _put_outputs(cells, place, first, change)


def _put_few(cells: Cells, place: RowsPlace, tokens: Sequence[int], rows: Array, base: BaseLayers) -> None:
    """A: by how much each row differs. B: which output it is."""
    module, rank = place.module, place.rank
    change = np.zeros_like(rows)
    for token, row, of_row in zip(tokens, rows, change, strict=True):
        if token < module.out_features:  # others were added
            of_row[:] = row - base.rows(module.name, token, 1)[0]
    a = cells.values[place.a_offset :][: rank * module.in_features]
    columns = np.ascontiguousarray(change.T)  # [in, rank]
    place_a(a, _as_cells(columns, cells.dtype).reshape(1, *columns.shape), cells.panel)
    for first, count in pieces_of(module.out_features, rank, cells.panel or 1):
        which = np.zeros((count, rank), np.float32)
        for row, token in enumerate(tokens):
            if first <= token < first + count:
                which[token - first, row] = 1.0
        _put_outputs(cells, place, first, which)


def _put_outputs(cells: Cells, place: RowsPlace, first: int, rows: Array) -> None:
    """B's part for some outputs, [count, rank], from output `first` on, which is a multiple of a panel."""
    count, rank = rows.shape
    columns = np.ascontiguousarray(rows.T)
    blocks = _as_cells(columns, cells.dtype).reshape(1, rank, count)
    b = cells.values[place.b_offset :][: rank * place.module.out_features]
    if cells.panel:
        place_b(b[first * rank : (first + count) * rank], blocks, cells.panel)
    else:
        b.reshape(rank, -1)[:, first : first + count] = blocks[0]


_PUT = {
    LayerKind.EMBEDDING: _put_embedding,
    LayerKind.ADDED_EMBEDDING: _put_added_embedding,
    LayerKind.HEAD: _put_head,
    LayerKind.ADDED_HEAD: _put_added_head,
}


def _as_cells(values: Array, dtype: torch.dtype) -> Array:
    """Flat, as a blob of `dtype` holds them. Raises ValueError for what it does not."""
    found = held(values.reshape(-1), "F32", dtype)
    if float(np.abs(values).max(initial=0.0)) > torch.finfo(dtype).max:
        raise ValueError(f"trained rows have values that are not finite in {str(dtype).removeprefix('torch.')}")
    return found
