"""Reads an adapter's weights and packs them the way the pool and the kernels hold them. Knows not what becomes of them.

Packing is numpy's: torch would start a second team of OpenMP threads in whichever worker calls it, and those threads
would spin against the ones that decode.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gralora_kernels.packing import ROW_MAJOR, Array, Packing, place_a, place_b
from gralora_kernels.tables import Entry, Storage
from gralora_runtime.adapters.checkpoint import AdapterHeader, AdapterSummary, PartTensors, Plan, inspect
from gralora_runtime.adapters.file import MalformedError, open_regular, read_at_most
from gralora_runtime.adapters.spec import ModuleShape, rejected
from gralora_runtime.adapters.tensors import WEIGHTS_FILE

__all__ = ["AdapterLayout", "LoadedAdapter", "inspect", "load"]

Layout = tuple[tuple[str, tuple[Entry, ...]], ...]  # per module: its name and its entries

# How numpy holds what safetensors calls so. It has no bfloat16: those stay bits.
ARRAYS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
STORAGES = {"F16": Storage.FLOAT16, "BF16": Storage.BFLOAT16}

# Torch works on fewer elements than this in the calling thread alone.
SERIAL_NUMEL = 32_000


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
    root: Path | None = None,
    packing: Packing = ROW_MAJOR,
) -> LoadedAdapter:
    """Read, check and pack an adapter for a pool of `dtype`, or raise AdapterRejectedError with every reason.

    `packing` is how the kernels want matrices to lie. The digest depends neither on it nor on `dtype`.
    """
    assert dtype == torch.float32 or not packing.keeps_16_bit, "only an fp32 pool holds matrices of 16 bits as they are"
    header = inspect(path, name=name, root=root)
    plan = header.fitting_plan(modules)
    width = max(module.width for module in plan)
    check_width(name, width, max_width)
    weights = _Weights(plan, header, _read(name, path, root, header))
    if problems := list(weights.not_finite(dtype)):
        raise rejected(name, problems)
    packed, modules_layout = weights.pack(packing)
    layout = AdapterLayout(
        digest=weights.digest(),
        numel=packed.size,
        width=width,
        modules=modules_layout,
        summary=header.summary(modules, keeps_16_bit=packing.keeps_16_bit),
    )
    return LoadedAdapter(layout, _cast(packed, dtype))


def check_width(name: str, width: int, max_width: int) -> None:
    """The kernels' intermediate result has so many columns and no more."""
    if width > max_width:
        raise rejected(name, [f"its rank r * k + hybrid_r is {width}, this server takes at most {max_width}"])


def _read(name: str, path: Path, root: Path | None, header: AdapterHeader) -> bytes:
    """Read in one go, not mapped: a mapped file that somebody truncates would kill the process."""
    try:
        with open_regular(path, WEIGHTS_FILE, root) as opened:
            data = read_at_most(opened, WEIGHTS_FILE, header.file_bytes + 1)
    except MalformedError as cause:
        raise rejected(name, [str(cause)]) from cause
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    if len(data) != header.file_bytes or hash(data[:header_bytes]) != header.fingerprint:
        raise rejected(name, [f"{WEIGHTS_FILE} changed while it was being read"])
    return data


class _Weights:
    """The tensors of a checkpoint that follows its plan."""

    def __init__(self, plan: Plan, header: AdapterHeader, data: bytes) -> None:
        self._plan = plan
        self._header = header
        self._tensors: dict[str, Array] = {
            name: np.frombuffer(data, ARRAYS[tensor.dtype], tensor.numel, tensor.begin).reshape(tensor.shape)
            for name, tensor in header.tensors.items()
        }

    def not_finite(self, dtype: torch.dtype) -> Iterator[str]:
        """Tensors with values that are NaN or infinite, or become so in the pool's dtype."""
        largest = torch.finfo(dtype).max
        for module in self._plan:
            for pair in module.parts:
                for name in (pair.a_name, pair.b_name):
                    if not _is_within(self._tensors[name], largest, self._header.tensors[name].dtype):
                        kind = str(dtype).removeprefix("torch.")
                        yield f"tensor {name} has values that are not finite in {kind}"

    def digest(self) -> str:
        """Hash of what the adapter computes, of its weights as they are stored. Names, dialects and training settings
        leave no trace in it."""
        layers = [
            (module.module.name, module.module.in_features, module.module.out_features, pair.part.r, pair.part.k,
             float(pair.part.scale).hex(), pair.a_shape, pair.b_shape, self._dtypes(pair))
            for module in self._plan
            for pair in module.parts
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(layers).encode())
        for module in self._plan:
            for pair in module.parts:
                digest.update(self._tensors[pair.a_name].data)
                digest.update(self._tensors[pair.b_name].data)
        return digest.hexdigest()

    def pack(self, packing: Packing) -> tuple[Array, Layout]:
        """First all A, then all B, in the order of modules, in float32 but where 16 bits are kept.

        So what one kernel reads of a projection group lies side by side.
        """
        keeps = packing.keeps_16_bit
        sizes = [self._header.pair_numel(pair, keeps_16_bit=keeps) for module in self._plan for pair in module.parts]
        packed = np.zeros(sum(map(sum, sizes)), np.float32)
        a_offset, b_offset = 0, sum(a_numel for a_numel, _ in sizes)
        numels = iter(sizes)
        layout: list[tuple[str, tuple[Entry, ...]]] = []
        for module in self._plan:
            entries: list[Entry] = []
            for pair in module.parts:
                a_numel, b_numel = next(numels)
                dtype = self._header.dtype_of_16_bits(pair) if keeps else None
                a, b = self._blocks(pair, widen=dtype is None)
                place_a(packed[a_offset:].view(a.dtype)[: a.size], a, packing.panel)
                place_b(packed[b_offset:].view(b.dtype)[: b.size], b, packing.panel)
                entries.append(
                    Entry(
                        a_offset=a_offset,
                        b_offset=b_offset,
                        r=pair.part.r,
                        k=pair.part.k,
                        scale=pair.part.scale,
                        storage=STORAGES[dtype] if dtype else Storage.NATIVE,
                    )
                )
                a_offset += a_numel
                b_offset += b_numel
            layout.append((module.module.name, tuple(entries)))
        return packed, tuple(layout)

    def _dtypes(self, pair: PartTensors) -> tuple[str, str]:
        return self._header.tensors[pair.a_name].dtype, self._header.tensors[pair.b_name].dtype

    def _blocks(self, pair: PartTensors, *, widen: bool) -> tuple[Array, Array]:
        """Views of the two tensors as A [k, in/k, r] and B [k, r, out/k]."""
        a, b = self._tensors[pair.a_name], self._tensors[pair.b_name]
        if widen:
            a, b = (_widened(tensor, dtype) for tensor, dtype in zip((a, b), self._dtypes(pair), strict=True))
        return (a, b) if a.ndim == 3 else (a.T[np.newaxis], b.T[np.newaxis])  # a plain pair: A [r, in], B [out, r]


def _is_within(tensor: Array, largest: float, dtype: str) -> bool:
    """Whether all values are finite and none is beyond `largest`. No temporary of more than the tensor's size."""
    if dtype not in STORAGES:
        return bool(tensor.min() >= -largest and tensor.max() <= largest)  # NaN compares false with everything
    # Without their sign, bits are ordered as the values that they stand for, and NaN is above all.
    limit = 0x7BFF if dtype == "F16" else int(np.float32(largest).view(np.uint32) >> 16)
    return int((tensor.view(np.uint16) & 0x7FFF).max()) <= limit


def _widened(tensor: Array, dtype: str) -> Array:
    if dtype == "BF16":  # the upper half of a float32
        return (tensor.astype(np.uint32) << 16).view(np.float32)
    return tensor.astype(np.float32, copy=False)


def _cast(packed: Array, dtype: torch.dtype) -> Tensor:
    source = torch.from_numpy(packed)
    if dtype == torch.float32:
        return source
    blob = torch.empty(packed.size, dtype=dtype)  # [numel]
    copy_serially(blob, source)
    return blob


def copy_serially(target: Tensor, source: Tensor) -> None:
    """Copy without torch's thread pool, which belongs to the thread that decodes."""
    if target.device.type != "cpu" or source.device.type != "cpu":
        target.copy_(source)
        return
    for start in range(0, target.numel(), SERIAL_NUMEL):
        chunk = slice(start, start + SERIAL_NUMEL)
        target[chunk].copy_(source[chunk])
