"""Reads an adapter's weights and packs them the way the pool and the kernels hold them. Knows not what becomes of them.

A tensor is read, checked, hashed, converted and put in its place at once, while it is in a core's cache. Who does that
is for the caller to say (`Spread`): where all cores decode, it is the calling thread alone. Moving is numpy's, and
torch converts in small pieces, because it would start a second team of OpenMP threads in whichever thread calls it, and
those would spin against the ones that decode.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gralora_kernels.packing import ROW_MAJOR, Array, Packing, place_a, place_b
from gralora_kernels.tables import Entry, Storage
from gralora_runtime.adapters.checkpoint.bounds import largest_magnitude, norm_bounds
from gralora_runtime.adapters.checkpoint.file import MalformedError, open_regular, read_at_most
from gralora_runtime.adapters.checkpoint.golden import has_golden
from gralora_runtime.adapters.checkpoint.header import AdapterHeader, AdapterSummary, Plan, inspect
from gralora_runtime.adapters.checkpoint.spec import ModuleShape, rejected
from gralora_runtime.adapters.checkpoint.tensors import DTYPES, WEIGHTS_FILE, TensorInfo
from gralora_runtime.adapters.residency.transfer import Spread, serial_pieces, serially

__all__ = ["AdapterLayout", "LoadedAdapter", "inspect", "load"]

Layout = tuple[tuple[str, tuple[Entry, ...]], ...]  # per module: its name and its entries

# How numpy holds what safetensors calls so. It has no bfloat16: those stay bits, and so do all 16 bits in a blob.
ARRAYS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORAGES = {"F16": Storage.FLOAT16, "BF16": Storage.BFLOAT16}

# Bytes of the file that are one piece of work: enough that handing it over costs little beside it, and few enough that
# a step which runs on the same cores is kept up by a millisecond and no more.
PIECE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLayout:
    """Where the matrices of each module lie in an adapter's blob."""

    digest: str  # SHA-256, hexadecimal, of the mathematics: shapes, scales and weights as they are stored
    numel: int  # of the blob
    width: int  # the most columns of intermediate result that any module needs
    modules: Layout  # offsets count from the blob's start
    summary: AdapterSummary


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
    packing: Packing = ROW_MAJOR,
    spread: Spread = serially,
) -> LoadedAdapter:
    """Read, check and pack an adapter for a pool of `dtype`, or raise AdapterRejectedError with every reason.

    `packing` is how the kernels want matrices to lie. The digest depends neither on it nor on `dtype`.
    """
    assert dtype == torch.float32 or not packing.keeps_16_bit, "only an fp32 pool holds matrices of 16 bits as they are"
    header = inspect(path, name=name, roots=roots)
    plan = header.fitting_plan(modules)
    width = max(module.width for module in plan)
    check_width(name, width, max_width)
    try:
        with open_regular(path, WEIGHTS_FILE, roots) as opened:
            check_unchanged(opened, header)
            packer = Packer(plan, header, dtype, packing)
            facts = packer.pack(opened.fileno(), spread)
    except MalformedError as cause:
        raise rejected(name, [str(cause)]) from cause
    if problems := [fact.problem for fact in facts if fact.problem]:
        raise rejected(name, problems)
    layout = AdapterLayout(
        digest=digest_of(plan, header, [fact.digest for fact in facts]),
        numel=packer.blob.numel(),
        width=width,
        modules=packer.layout,
        summary=header.summary(modules, keeps_16_bit=packing.keeps_16_bit),
    )
    bounds = norm_bounds(plan, [fact.magnitude for fact in facts])
    return LoadedAdapter(layout, packer.blob, has_golden=has_golden(path), bounds=bounds)


def check_width(name: str, width: int, max_width: int) -> None:
    """The kernels' intermediate result has so many columns and no more."""
    if width > max_width:
        raise rejected(name, [f"its rank r * k + hybrid_r is {width}, this server takes at most {max_width}"])


def digest_of(plan: Plan, header: AdapterHeader, digests: Iterable[bytes]) -> str:
    """SHA-256 of what the adapter computes, with its weights as they are stored: of a description of all tensors, and
    the SHA-256 of each one's bytes, A before B, in the order of modules. Those can be had in any order, and beside one
    another. Names of tensors, dialects and training settings leave no trace in it.
    """
    layers = [
        (module.module.name, module.module.in_features, module.module.out_features, pair.part.r, pair.part.k,
         float(pair.part.scale).hex(), pair.a_shape, pair.b_shape,
         (header.tensors[pair.a_name].dtype, header.tensors[pair.b_name].dtype))
        for module in plan
        for pair in module.parts
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(layers).encode())
    for of_tensor in digests:
        digest.update(of_tensor)
    return digest.hexdigest()


def check_unchanged(opened: BinaryIO, header: AdapterHeader) -> None:
    """Raises MalformedError if this is not the file whose header was read before."""
    header_bytes = min(tensor.begin for tensor in header.tensors.values())
    same_size = os.fstat(opened.fileno()).st_size == header.file_bytes
    if not same_size or hash(read_at_most(opened, WEIGHTS_FILE, header_bytes)) != header.fingerprint:
        raise _changed()


def _changed() -> MalformedError:
    return MalformedError(f"{WEIGHTS_FILE} changed while it was being read")


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One tensor of the file, and where it goes."""

    name: str
    stored: TensorInfo
    is_a: bool
    offset: int  # of the blob, in its elements
    dtype: torch.dtype  # as the blob holds it

    @property
    def num_bytes(self) -> int:
        return self.stored.end - self.stored.begin


@dataclass(frozen=True, slots=True)
class Fact:
    """What was found out about a tensor. One that has a problem is not in the blob."""

    name: str
    digest: bytes  # SHA-256 of its bytes
    magnitude: float  # the largest of its values
    problem: str = ""


class Packer:
    """The blob of a checkpoint that follows its plan: first all A, then all B, in the order of modules.

    So what one kernel reads of a projection group lies side by side.
    """

    def __init__(self, plan: Plan, header: AdapterHeader, dtype: torch.dtype, packing: Packing) -> None:
        self._dtype = dtype
        self._panel = packing.panel
        self._largest = torch.finfo(dtype).max
        self.matrices: list[Matrix] = []
        self.layout, numel = self._lay_out(plan, header, keeps_16_bit=packing.keeps_16_bit)
        # Untouched memory until it is written, in large pages where the system has them.
        self._cells = np.zeros(numel, np.float32 if dtype == torch.float32 else np.uint16)
        self.blob = torch.from_numpy(self._cells).view(dtype)  # [numel]

    def pack(self, file: int, spread: Spread) -> list[Fact]:
        """Fill the blob, from the front of the file to its end; what was found is in the order of matrices.

        Raises MalformedError if the file is not what it was.
        """

        def work(piece: Sequence[Matrix]) -> list[Fact]:
            start = piece[0].stored.begin
            data = read_range(file, start, piece[-1].stored.end)
            return [self.take(m, data[m.stored.begin - start : m.stored.end - start]) for m in piece]

        in_file = sorted(self.matrices, key=lambda matrix: (matrix.stored.begin, matrix.stored.end))
        found = {fact.name: fact for facts in spread(work, list(_pieces(in_file))) for fact in facts}
        return [found[matrix.name] for matrix in self.matrices]

    def _lay_out(self, plan: Plan, header: AdapterHeader, *, keeps_16_bit: bool) -> tuple[Layout, int]:
        """Where each matrix goes, and how many elements that makes."""
        sizes = [header.pair_numel(pair, keeps_16_bit=keeps_16_bit) for module in plan for pair in module.parts]
        a_offset, b_offset = 0, sum(a_numel for a_numel, _ in sizes)
        numels = iter(sizes)
        layout: list[tuple[str, tuple[Entry, ...]]] = []
        for module in plan:
            entries: list[Entry] = []
            for pair in module.parts:
                kept = header.dtype_of_16_bits(pair) if keeps_16_bit else None
                dtype = TORCH_DTYPES[kept] if kept else self._dtype
                for is_a, name, offset in ((True, pair.a_name, a_offset), (False, pair.b_name, b_offset)):
                    self.matrices.append(
                        Matrix(name=name, stored=header.tensors[name], is_a=is_a, offset=offset, dtype=dtype)
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
            layout.append((module.module.name, tuple(entries)))
        return tuple(layout), b_offset

    def take(self, matrix: Matrix, data: Array) -> Fact:
        """Check, hash, convert and place a tensor, uint8 [bytes]."""
        stored = matrix.stored
        digest = hashlib.sha256(data.data).digest()
        values: Array = data.view(ARRAYS[stored.dtype])  # [numel]
        magnitude = largest_magnitude(values, stored.dtype)
        if magnitude > self._largest:
            kind = str(self._dtype).removeprefix("torch.")
            problem = f"tensor {matrix.name} has values that are not finite in {kind}"
            return Fact(matrix.name, digest, magnitude, problem)
        tensor = held(values, stored.dtype, matrix.dtype).reshape(stored.shape)
        cells = self._cells[matrix.offset :].view(tensor.dtype)[: tensor.size]
        # A plain pair is A [r, in], B [out, r]; blocks are A [k, in/k, r], B [k, r, out/k].
        blocks = tensor if tensor.ndim == 3 else tensor.T[np.newaxis]
        place = place_a if matrix.is_a else place_b
        place(cells, blocks, self._panel)
        return Fact(matrix.name, digest, magnitude)


def _pieces(matrices: Iterable[Matrix]) -> Iterator[list[Matrix]]:
    """Neighbours, together `PIECE_BYTES` or a little more."""
    piece: list[Matrix] = []
    num_bytes = 0
    for matrix in matrices:
        piece.append(matrix)
        num_bytes += matrix.num_bytes
        if num_bytes >= PIECE_BYTES:
            yield piece
            piece, num_bytes = [], 0
    if piece:
        yield piece


def read_range(file: int, start: int, end: int) -> Array:
    """Bytes of the file. Several threads may ask at once: no position is moved. They are read, not mapped: a mapped
    file that somebody truncates would kill the process."""
    data = np.empty(end - start, np.uint8)
    num_read = 0
    while num_read < len(data):
        try:
            num_new = os.preadv(file, [data[num_read:].data], start + num_read)
        except OSError as cause:
            raise MalformedError(f"{WEIGHTS_FILE} cannot be read ({cause.strerror})") from cause
        if num_new == 0:
            raise _changed()
        num_read += num_new
    return data


def held(values: Array, stored: str, dtype: torch.dtype) -> Array:
    """Flat values as a blob of `dtype` holds them, 16 bits as bits. What has to be rounded is rounded from float32."""
    if TORCH_DTYPES[stored] != dtype:
        values = np.require(values, requirements="A")  # a tensor may begin at any byte of a file
        source = torch.from_numpy(values.view(np.int16) if DTYPES[stored] == 2 else values).view(TORCH_DTYPES[stored])
        result = torch.empty(len(values), dtype=dtype)
        directly = torch.float32 in {source.dtype, dtype}
        for to, of in zip(serial_pieces(result), serial_pieces(source), strict=True):
            to.copy_(of if directly else of.float())
        values = result.view(torch.int16).numpy() if dtype.itemsize == 2 else result.numpy()
    return values.view(np.uint16) if dtype.itemsize == 2 else values
