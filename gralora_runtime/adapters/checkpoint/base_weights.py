"""Copies of the base model's weights in a checkpoint, held against what the base model has. Knows no adapter's matrix.

PEFT saves an embedding and an output head beside a pair that is on them, whether or not they were trained. It would
serve what is in the file; here all adapters share one base, so it has to be the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gralora_runtime.adapters.checkpoint.affine import BaseLayers
from gralora_runtime.adapters.checkpoint.plan import Copy, weight_shape
from gralora_runtime.adapters.checkpoint.recipe import TORCH_DTYPES
from gralora_runtime.adapters.checkpoint.rows import pieces_of
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.checkpoint.stored import held, read_range
from gralora_runtime.adapters.checkpoint.tensors import DTYPES, TensorInfo


def other_weights(
    file: int, copies: Sequence[Copy], tensors: Mapping[str, TensorInfo], base: BaseLayers
) -> Iterator[str]:
    """What is to be said of each copy that is not the base model's weight, as the copy's dtype can tell."""
    for copy in copies:
        stored = tensors[copy.name]
        if copy.like:
            if not _is_same(file, stored, tensors[copy.like]):
                yield f"tensor {copy.name} is not what {copy.like} is"
        elif not _is_base(file, stored, copy.module, base):
            yield (
                f"tensor {copy.name} is not the base model's weight: it was trained too, or the adapter is of another "
                "model"
            )


def _is_base(file: int, stored: TensorInfo, module: ModuleShape, base: BaseLayers) -> bool:
    """Those of its rows that the base model has."""
    rows, width = weight_shape(module)
    row_bytes = width * DTYPES[stored.dtype]
    for first, count in pieces_of(rows, width):
        begin = stored.begin + first * row_bytes
        theirs = read_range(file, begin, begin + count * row_bytes)
        ours = held(base.rows(module.name, first, count).reshape(-1), "F32", TORCH_DTYPES[stored.dtype])
        if not np.array_equal(theirs, np.ascontiguousarray(ours).view(np.uint8)):
            return False
    return True


def _is_same(file: int, stored: TensorInfo, other: TensorInfo) -> bool:
    if stored.dtype != other.dtype or stored.shape != other.shape:
        return False
    for at, size in pieces_of(stored.end - stored.begin, 1):
        mine, others = (read_range(file, one.begin + at, one.begin + at + size) for one in (stored, other))
        if not np.array_equal(mine, others):
            return False
    return True
