"""Copies of the base model's weights in a checkpoint, held against what the base model has. Knows no adapter's matrix.

PEFT saves the output head beside a pair that is on it, whether or not it was trained. PEFT would serve what is in the
file; here all adapters share one base, so it has to be the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from gralora_runtime.adapters.checkpoint.affine import BaseLayers
from gralora_runtime.adapters.checkpoint.header import Plan
from gralora_runtime.adapters.checkpoint.recipe import TORCH_DTYPES
from gralora_runtime.adapters.checkpoint.stored import held, read_range
from gralora_runtime.adapters.checkpoint.tensors import DTYPES, TensorInfo

PIECE_BYTES = 4 << 20


def other_weights(file: int, plan: Plan, tensors: Mapping[str, TensorInfo], base: BaseLayers) -> Iterator[str]:
    """What is to be said of each copy that is not the base model's weight, as the copy's dtype can tell."""
    for module in plan:
        stored = tensors.get(module.base_weight)
        if stored is not None and not _is_base(file, stored, module.module.name, base):
            yield (
                f"tensor {module.base_weight} is not the base model's weight: it was trained too, or the adapter is "
                "of another model"
            )


def _is_base(file: int, stored: TensorInfo, module: str, base: BaseLayers) -> bool:
    rows, width = stored.shape
    row_bytes = width * DTYPES[stored.dtype]
    at_once = max(1, PIECE_BYTES // row_bytes)
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        begin = stored.begin + first * row_bytes
        theirs = read_range(file, begin, begin + count * row_bytes)
        ours = held(base.rows(module, first, count).reshape(-1), "F32", TORCH_DTYPES[stored.dtype])
        if not np.array_equal(theirs, np.ascontiguousarray(ours).view(np.uint8)):
            return False
    return True
