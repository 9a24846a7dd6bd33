"""Reads an adapter's weights and packs them the way the pool and the kernels hold them. Knows not what becomes of them.

The only user of safetensors. Packing is numpy's: torch would start a second team of OpenMP threads in whichever worker
calls it, and those threads would spin against the ones that decode.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from gralora_kernels.packing import arrange_a, arrange_b
from gralora_kernels.tables import Entry
from gralora_runtime.adapters.checkpoint import (
    WEIGHTS_FILE,
    AdapterHeader,
    AdapterSummary,
    ModulePlan,
    PartTensors,
    aligned,
    inspect,
)
from gralora_runtime.adapters.spec import ModuleShape, rejected

__all__ = ["AdapterLayout", "LoadedAdapter", "inspect", "load"]

Array = npt.NDArray[np.float32]
Layout = tuple[tuple[str, tuple[Entry, ...]], ...]  # per module: its name and its entries

# Torch works on fewer elements than this in the calling thread alone.
SERIAL_NUMEL = 32_000


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLayout:
    """Where the matrices of each module lie in an adapter's blob."""

    digest: str  # SHA-256, hexadecimal, of the mathematics: shapes, scales and weights
    numel: int
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
    panel: int = 0,
) -> LoadedAdapter:
    """Read, check and pack an adapter, or raise AdapterRejectedError with every reason.

    `panel` is how the kernels want matrices to lie (`gralora_kernels.packing`); the digest does not depend on it.
    """
    header = inspect(path, name=name, root=root)
    plan = header.fitting_plan(modules)
    width = max(module.width for module in plan)
    check_width(name, width, max_width)
    tensors = _read_tensors(name, path / WEIGHTS_FILE, header)
    packed, modules_layout = _pack(plan, tensors)
    if problems := _not_finite(plan, modules_layout, packed, dtype):
        raise rejected(name, problems)
    layout = AdapterLayout(
        digest=_digest(plan, modules_layout, packed),
        numel=packed.size,
        width=width,
        modules=modules_layout,
        summary=header.summary(modules),
    )
    if panel:
        _arrange(modules_layout, plan, packed, panel)
    return LoadedAdapter(layout, _cast(packed, dtype))


def check_width(name: str, width: int, max_width: int) -> None:
    """The kernels' intermediate result has so many columns and no more."""
    if width > max_width:
        raise rejected(name, [f"its rank r * k + hybrid_r is {width}, this server takes at most {max_width}"])


def _read_tensors(name: str, weights: Path, header: AdapterHeader) -> dict[str, Array]:
    """Read in one go, not mapped: a mapped file that somebody truncates would kill the process."""
    try:
        data = weights.read_bytes()
    except OSError as cause:
        raise rejected(name, [f"{WEIGHTS_FILE} cannot be read ({cause.strerror})"]) from cause
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    if hash(data[:header_bytes]) != header.fingerprint:
        raise rejected(name, [f"{WEIGHTS_FILE} changed while it was being read"])
    try:
        return {tensor: _to_float32(raw) for tensor, raw in deserialize(data)}  # type: ignore[no-untyped-call]
    except SafetensorError as cause:
        raise rejected(name, [f"{WEIGHTS_FILE} is broken ({cause})"]) from cause


def _to_float32(raw: Mapping[str, Any]) -> Array:
    dtype, shape = raw["dtype"], raw["shape"]
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw["data"], np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    values = np.frombuffer(raw["data"], {"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype])
    with np.errstate(over="ignore"):  # an F64 that becomes infinite is found by the check for finite values
        return values.astype(np.float32, copy=False).reshape(shape)


def _pack(plan: Sequence[ModulePlan], tensors: Mapping[str, Array]) -> tuple[Array, Layout]:
    """Copy every matrix to its place, one after the other."""
    packed: Array = np.zeros(sum(module.packed_numel for module in plan), np.float32)
    offset = 0
    layout: list[tuple[str, tuple[Entry, ...]]] = []
    for module in plan:
        entries: list[Entry] = []
        for pair in module.parts:
            a, b = _packed_pair(pair, tensors)
            b_offset = offset + aligned(a.size)
            _place(packed, offset, a)
            _place(packed, b_offset, b)
            part = pair.part
            entries.append(Entry(a_offset=offset, b_offset=b_offset, r=part.r, k=part.k, scale=part.scale))
            offset = b_offset + aligned(b.size)
        layout.append((module.module.name, tuple(entries)))
    return packed, tuple(layout)


def _packed_pair(pair: PartTensors, tensors: Mapping[str, Array]) -> tuple[Array, Array]:
    """Views of the two tensors as `Ap [r, in]` and `Bp [r, out]`."""
    a, b, r = tensors[pair.a_name], tensors[pair.b_name], pair.part.r
    if a.ndim == 2:  # a plain pair: A [r, in], B [out, r]
        return a, b.T
    # GraLoRA: A [k, in/k, r], B [k, r, out/k]
    return a.transpose(2, 0, 1).reshape(r, -1), b.transpose(1, 0, 2).reshape(r, -1)


def _place(packed: Array, offset: int, matrix: Array) -> None:
    packed[offset : offset + matrix.size].reshape(matrix.shape)[:] = matrix


def _arrange(layout: Layout, plan: Sequence[ModulePlan], packed: Array, panel: int) -> None:
    """In place, from row-major matrices to panels."""
    for module, (_, entries) in zip(plan, layout, strict=True):
        for entry in entries:
            a, b = _matrices(module, entry, packed)
            a[:] = arrange_a(a.reshape(entry.r, -1), entry.k, panel)
            b[:] = arrange_b(b.reshape(entry.r, -1), entry.k, panel)


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


def _not_finite(plan: Sequence[ModulePlan], layout: Layout, packed: Array, dtype: torch.dtype) -> list[str]:
    """Weights that are NaN or infinite, or become so in the pool's dtype."""
    largest = torch.finfo(dtype).max
    problems: list[str] = []
    for module, (_, entries) in zip(plan, layout, strict=True):
        for pair, entry in zip(module.parts, entries, strict=True):
            for name, matrix in zip((pair.a_name, pair.b_name), _matrices(module, entry, packed), strict=True):
                # NaN compares false with everything. Two reductions, no temporary of the matrix's size.
                if not (matrix.min() >= -largest and matrix.max() <= largest):
                    problems.append(
                        f"tensor {name} has values that are not finite in {str(dtype).removeprefix('torch.')}"
                    )
    return problems


def _digest(plan: Sequence[ModulePlan], layout: Layout, packed: Array) -> str:
    """Hash of what the adapter computes. Names, dialects, storage dtypes and training settings leave no trace in it."""
    digest = hashlib.sha256()
    for module, (name, entries) in zip(plan, layout, strict=True):
        shape = module.module
        parts = [(entry.r, entry.k, float(entry.scale).hex()) for entry in entries]
        digest.update(json.dumps([name, shape.in_features, shape.out_features, parts]).encode())
        for entry in entries:
            for matrix in _matrices(module, entry, packed):
                digest.update(matrix.data)
    return digest.hexdigest()


def _matrices(module: ModulePlan, entry: Entry, packed: Array) -> tuple[Array, Array]:
    a_numel, b_numel = entry.r * module.module.in_features, entry.r * module.module.out_features
    return packed[entry.a_offset : entry.a_offset + a_numel], packed[entry.b_offset : entry.b_offset + b_numel]
