"""The matrices of a packed adapter as its checkpoint had them: the way back from what `loader` does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gralora_kernels.packing import ROW_MAJOR, Array, Packing, blocks_a, blocks_b
from gralora_kernels.tables import Entry, Storage
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.checkpoint.update import LowRank, Update

_DTYPES = {Storage.FLOAT16: torch.float16, Storage.BFLOAT16: torch.bfloat16}


def updates_in(
    adapter: LoadedAdapter, modules: Sequence[ModuleShape], packing: Packing = ROW_MAJOR
) -> dict[str, Update]:
    """What it adds to which module. `packing` and `modules`: what it was loaded with."""
    shapes = {module.name: module for module in modules}
    return {
        name: tuple(_pair(adapter.blob, entry, shapes[name], packing.panel) for entry in entries)
        for name, entries in adapter.layout.modules
    }


def _pair(blob: Tensor, entry: Entry, shape: ModuleShape, panel: int) -> LowRank:
    dtype = _DTYPES.get(entry.storage, blob.dtype)
    a = _bits(blob, entry.a_offset, entry.r * shape.in_features, dtype)
    b = _bits(blob, entry.b_offset, entry.r * shape.out_features, dtype)
    return LowRank(
        a=torch.from_numpy(blocks_a(a, entry.k, entry.r, panel)).view(dtype),
        b=torch.from_numpy(blocks_b(b, entry.k, entry.r, panel)).view(dtype),
        scale=entry.scale,
    )


def _bits(blob: Tensor, offset: int, numel: int, dtype: torch.dtype) -> Array:
    """Elements as numpy moves them: it has no bfloat16."""
    cells = blob[offset:].view(dtype)[:numel]
    found: Array = (cells.view(torch.int16) if dtype.itemsize == 2 else cells).numpy()
    return found
