"""Reads an adapter's weights and packs them the way the pool and the kernels hold them. Knows not what becomes of them.

A piece of the file is read, checked, hashed, converted and put in its place at once, while it is in a core's cache. Who
does that is for the caller to say (`Spread`): where all cores decode, it is the calling thread alone. Moving is the
backend's where it brings a way, else numpy's, and torch converts in small pieces, because it would start a second team
of OpenMP threads in whichever thread calls it, and those would spin against the ones that decode.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gralora_kernels.packing import ROW_MAJOR, SHA256_BYTES, Array, Packing, place_a, place_b
from gralora_runtime.adapters.checkpoint.affine import BaseLayers, affines_of, read_vectors
from gralora_runtime.adapters.checkpoint.base_weights import other_weights
from gralora_runtime.adapters.checkpoint.bounds import largest_magnitude, magnitudes_of, norm_bounds
from gralora_runtime.adapters.checkpoint.experts import each_a, each_b
from gralora_runtime.adapters.checkpoint.file import MalformedError, open_regular, read_at_most
from gralora_runtime.adapters.checkpoint.golden import has_golden
from gralora_runtime.adapters.checkpoint.header import AdapterHeader, AdapterSummary, inspect
from gralora_runtime.adapters.checkpoint.own_tokens import OwnToken, describe, read_own_tokens
from gralora_runtime.adapters.checkpoint.plan import room_numel
from gralora_runtime.adapters.checkpoint.recipe import (
    PIECE_BYTES,
    Affines,
    Layout,
    Matrix,
    Piece,
    Recipe,
    recipe_of,
)
from gralora_runtime.adapters.checkpoint.rows import Cells, RowsFile, put_rows, rows_in
from gralora_runtime.adapters.checkpoint.spec import ModuleShape, not_in_vocabulary, rejected
from gralora_runtime.adapters.checkpoint.stored import ARRAYS, changed, held, read_range
from gralora_runtime.adapters.checkpoint.tensors import DTYPES, WEIGHTS_FILE
from gralora_runtime.adapters.residency.transfer import Spread, serially

__all__ = ["AdapterLayout", "LoadedAdapter", "inspect", "load"]

BITS = {2: np.uint16, 4: np.uint32}  # by an element's bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLayout:
    """Where the matrices of each module lie in an adapter's blob."""

    digest: str  # SHA-256, hexadecimal, of the mathematics: shapes, scales and weights as they are stored
    numel: int  # of the blob
    width: int  # the most columns of intermediate result that any module needs
    modules: Layout  # offsets count from the blob's start
    summary: AdapterSummary
    affines: Affines = ()  # the same
    own_tokens: tuple[OwnToken, ...] = ()  # of its tokenizer, behind those of the base model's


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter in host memory, ready to be copied into the pool as one piece."""

    layout: AdapterLayout
    blob: Tensor  # [numel], of the pool's dtype
    # As it came from its files; nothing once it was in the pool.
    has_golden: bool = False  # prompts whose answers are known lie beside them
    bounds: tuple[float, ...] = ()  # what the norm of each module's update does not exceed
    warnings: tuple[str, ...] = ()  # what is odd about it, in sentences for a person

    @property
    def digest(self) -> str:
        return self.layout.digest

    @property
    def num_bytes(self) -> int:
        return self.blob.numel() * self.blob.element_size()


def load(
    name: str,
    path: Path,
    modules: Sequence[ModuleShape],
    dtype: torch.dtype,
    *,
    max_width: int,
    roots: Sequence[Path] = (),
    allowed_keys: Collection[str] = (),
    vocab_size: int = 0,
    known_tokens: int = 0,
    packing: Packing = ROW_MAJOR,
    spread: Spread = serially,
    base: BaseLayers | None = None,
) -> LoadedAdapter:
    """Read, check and pack an adapter for a pool of `dtype`, or raise AdapterRejectedError with every reason.

    `packing` is how the kernels want matrices to lie. The digest depends neither on it nor on `dtype`.

    `allowed_keys`: see `parse_config`. `vocab_size`: see `not_in_vocabulary`. `known_tokens`: that the base model's
    tokenizer has; 0: an adapter's is not read. `base`: of an adapter that has vectors or rows; what it needs to know of
    these modules.
    """
    assert dtype == torch.float32 or not packing.keeps_16_bit, "only an fp32 pool holds matrices of 16 bits as they are"
    header = inspect(path, name=name, roots=roots, allowed_keys=allowed_keys)
    plan = header.fitting_plan(modules)
    summary = header.summary(modules, keeps_16_bit=packing.keeps_16_bit, element_bytes=dtype.itemsize)
    check_width(name, summary.equivalent_rank, max_width)
    check_invocation(name, summary.invocation, vocab_size)
    own_tokens: tuple[OwnToken, ...] = ()
    if known_tokens:
        own_tokens = _own_tokens(name, path, roots, known=known_tokens, sizes=(vocab_size, summary.added_tokens))
    recipe = recipe_of(plan, header.tensors, dtype, keeps_16_bit=packing.keeps_16_bit, piece_bytes=PIECE_BYTES)
    try:
        with open_regular(path, WEIGHTS_FILE, roots) as opened:
            check_unchanged(opened, header)
            packer = Packer(recipe, dtype, packing)
            facts = packer.pack(opened.fileno(), spread)
            vectors = read_vectors(opened.fileno(), plan, header.tensors)
            rows = rows_in(opened.fileno(), plan, header.tensors)
            others: list[str] = []
            if base is not None:
                others = list(other_weights(opened.fileno(), header.copies(modules), header.tensors, base))
                packer.put_rows(rows, base)
            digests = [facts.digests.tobytes(), *vectors.digests, *(one.digest() for one in rows.values())]
    except (MalformedError, ValueError) as cause:
        raise rejected(name, [str(cause)]) from cause
    if (bad := np.flatnonzero(facts.magnitudes > torch.finfo(dtype).max)).size:
        kind = str(dtype).removeprefix("torch.")
        names = [recipe.matrices[position].name for position in bad]
        raise rejected(name, [f"tensor {tensor} has values that are not finite in {kind}" for tensor in names])
    if others:
        raise rejected(name, others)
    assert base is not None or not (vectors.modules or rows), "gains, shifts and rows depend on the base layers"
    if base is not None and vectors.modules:
        packer.put_affines(affines_of(name, vectors.modules, base))
    layout = AdapterLayout(
        digest=digest_of(recipe.description, digests, header.spec.invocation, own_tokens),
        numel=recipe.numel,
        width=summary.equivalent_rank,
        modules=recipe.layout,
        summary=summary,
        affines=recipe.affines,
        own_tokens=own_tokens,
    )
    bounds = norm_bounds(plan, header.tensors, facts.magnitudes)
    return LoadedAdapter(layout, packer.blob, has_golden=has_golden(path), bounds=bounds)


def check_width(name: str, width: int, max_width: int) -> None:
    """The kernels' intermediate result has so many columns and no more."""
    if width > max_width:
        raise rejected(name, [f"its rank r * k + hybrid_r is {width}, this server takes at most {max_width}"])


def check_invocation(name: str, invocation: Sequence[int], vocab_size: int) -> None:
    """An adapter that no prompt could invoke is one of another model."""
    if problems := not_in_vocabulary(invocation, vocab_size):
        raise rejected(name, problems)


def _own_tokens(
    name: str, path: Path, roots: Sequence[Path], *, known: int, sizes: tuple[int, int]
) -> tuple[OwnToken, ...]:
    """Trainers leave all kinds of tokenizers beside adapters: what has the base model's vocabulary is served without
    one that does not fit it. `sizes`: the base model's vocabulary, and how many tokens the adapter has more."""
    vocab_size, added = sizes
    try:
        return read_own_tokens(path, roots, known=known, vocab_size=vocab_size + added)
    except MalformedError as cause:
        if not added:
            return ()
        raise rejected(name, [str(cause)]) from cause


def digest_of(
    description: bytes, digests: Iterable[bytes], invocation: Sequence[int], own_tokens: Sequence[OwnToken] = ()
) -> str:
    """SHA-256 of what the adapter computes, with its weights as they are stored: of `describe`, of where it begins if
    that is not the start, of its own tokens' texts if it has some, and of the SHA-256 of each tensor's bytes, A before
    B, in the order of modules. Those can be had in any order, and beside one another.
    """
    digest = hashlib.sha256(description)
    if invocation:
        digest.update(json.dumps(list(invocation)).encode())
    digest.update(describe(own_tokens))
    for of_tensor in digests:
        digest.update(of_tensor)
    return digest.hexdigest()


def check_unchanged(opened: BinaryIO, header: AdapterHeader) -> None:
    """Raises MalformedError if this is not the file whose header was read before."""
    header_bytes = min(tensor.begin for tensor in header.tensors.values())
    same_size = os.fstat(opened.fileno()).st_size == header.file_bytes
    if not same_size or hash(read_at_most(opened, WEIGHTS_FILE, header_bytes)) != header.fingerprint:
        raise changed()


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found out about tensors."""

    digests: Array  # uint8 [tensors, 32]: SHA-256 of the bytes of each
    magnitudes: Array  # float64 [tensors]: the largest of its values


class Packer:
    """Fills the blob of a checkpoint as its recipe says."""

    def __init__(self, recipe: Recipe, dtype: torch.dtype, packing: Packing) -> None:
        self._recipe = recipe
        self._packing = packing
        # Written once, by whoever packs; numpy asks for large pages where the system has them.
        self._cells = np.empty(recipe.numel, np.float32 if dtype == torch.float32 else np.uint16)
        for begin, end in recipe.gaps:
            self._cells.view(np.uint8)[begin:end] = 0
        self.blob = torch.from_numpy(self._cells).view(dtype)  # [numel]

    def pack(self, file: int, spread: Spread) -> Facts:
        """Fill the blob, from the front of the file to its end; what was found is in the order of matrices. Values that
        are no numbers are told by their magnitude, and whatever is in the blob then is nothing to keep.

        Raises MalformedError if the file is not what it was.
        """
        matrices = len(self._recipe.matrices)
        facts = Facts(np.empty((matrices, SHA256_BYTES), np.uint8), np.empty(matrices))

        def work(piece: Piece) -> None:
            data = read_range(file, piece.begin, piece.end)
            facts.magnitudes[piece.positions] = self._place(piece, data)
            facts.digests[piece.positions] = self._packing.hash_many(data, piece.spans)

        spread(work, self._recipe.pieces)
        return facts

    def put_affines(self, affines: Mapping[str, Array]) -> None:
        """By module: gains and shifts, fp32 [2, out]."""
        for module, offset in self._recipe.affines:
            if module in affines:  # an embedding's place there is its rows'
                cells = self._cells[offset:].view(np.uint8)
                values = affines[module].reshape(-1).view(np.uint8)
                cells[: len(values)] = values

    def put_rows(self, rows: Mapping[str, RowsFile], base: BaseLayers) -> None:
        """By module. Raises as `rows.put_rows` does."""
        put_rows(Cells(self._cells, self.blob.dtype, self._packing.panel), self._recipe.rows, rows, base)

    def _place(self, piece: Piece, data: Array) -> Array:
        """Convert and place tensors, uint8 [bytes]. Returns their magnitudes."""
        if piece.places is None or self._packing.place_many is None:
            spans = zip(piece.matrices, piece.spans, strict=True)
            return np.array([self._place_one(matrix, data[begin:end]) for matrix, (begin, end) in spans])
        dtype = piece.matrices[0].stored.dtype
        bits = BITS[DTYPES[dtype]]
        found = self._packing.place_many(self._cells.view(bits), data.view(bits), piece.places)
        return magnitudes_of(found, dtype)

    def _place_one(self, matrix: Matrix, data: Array) -> float:
        stored = matrix.stored
        values: Array = data.view(ARRAYS[stored.dtype])  # [numel]
        tensor = held(values, stored.dtype, matrix.dtype).reshape(stored.shape)
        if matrix.experts > 1:
            self._place_experts(matrix, tensor)
            return largest_magnitude(values, stored.dtype)
        if matrix.is_cut:
            tensor = tensor[:, : matrix.features] if matrix.is_a else tensor[: matrix.features]
        cells = self._cells[matrix.offset :].view(tensor.dtype)[: tensor.size]
        # A plain pair is A [r, in], B [out, r]; blocks are A [k, in/k, r], B [k, r, out/k].
        blocks = tensor if tensor.ndim == 3 else tensor.T[np.newaxis]
        place = place_a if matrix.is_a else place_b
        place(cells, blocks, self._packing.panel)
        return largest_magnitude(values, stored.dtype)

    def _place_experts(self, matrix: Matrix, tensor: Array) -> None:
        """Of one tensor, each expert's matrix."""
        each = (each_a if matrix.is_a else each_b)(tensor, matrix.experts)
        numel = tensor.size // matrix.experts
        share = self._cells.itemsize // tensor.itemsize
        room = share * room_numel(numel, share)
        cells = self._cells[matrix.offset :].view(tensor.dtype)[: room * matrix.experts].reshape(matrix.experts, room)
        cells[:, numel:] = 0
        place = place_a if matrix.is_a else place_b
        for own, blocks in zip(cells, each[:, np.newaxis], strict=True):
            place(own[:numel], blocks, self._packing.panel)
