"""The matrices of a packed adapter as its checkpoint had them: the way back from what `loader` does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gralora_kernels.packing import ROW_MAJOR, Array, Packing, blocks_a, blocks_b
from gralora_kernels.tables import DTYPES, Entry
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter
from gralora_runtime.adapters.checkpoint.plan import room_numel
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.checkpoint.update import LowRank, Update


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
    dtype = DTYPES.get(entry.storage, blob.dtype)
    a = _bits(blob, entry.a_offset, entry.r * shape.in_features, shape.experts, dtype)
    b = _bits(blob, entry.b_offset, entry.r * shape.out_features, shape.experts, dtype)
    return LowRank(
        a=torch.from_numpy(np.concatenate([blocks_a(own, entry.k, entry.r, panel) for own in a])).view(dtype),
        b=torch.from_numpy(np.concatenate([blocks_b(own, entry.k, entry.r, panel) for own in b])).view(dtype),
        scale=entry.scale,
        is_stack=shape.experts > 1,
    )


def _bits(blob: Tensor, offset: int, numel: int, experts: int, dtype: torch.dtype) -> Array:
    """Elements of a matrix, or of each expert's, [experts, numel], as numpy moves them: it has no bfloat16."""
    share = blob.element_size() // dtype.itemsize
    cells = blob[offset:].view(dtype)[: experts * share * room_numel(numel, share)]
    found: Array = (cells.view(torch.int16) if dtype.itemsize == 2 else cells).numpy()
    return found.reshape(experts, -1)[:, :numel]
