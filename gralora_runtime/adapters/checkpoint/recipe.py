"""Where everything of a checkpoint goes: the same for all adapters that one training recipe made. Reads no weights.

Finding that out takes longer than reading a small adapter, and holds the interpreter lock; so it is remembered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from gralora_kernels.tables import Entry, Storage
from gralora_runtime.adapters.checkpoint.header import Plan, dtype_of_16_bits, pair_numel
from gralora_runtime.adapters.checkpoint.tensors import TensorInfo

Layout = tuple[tuple[str, tuple[Entry, ...]], ...]  # per module: its name and its entries

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORAGES = {"F16": Storage.FLOAT16, "BF16": Storage.BFLOAT16}
MAX_KEPT_TENSORS = 2_000  # if larger ones were kept, a few strangers' could fill memory


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A blob has first all A, then all B, in the order of modules: what one kernel reads of a projection group lies
    side by side."""

    layout: Layout
    numel: int  # of the blob
    matrices: tuple[Matrix, ...]  # A before B, in the order of modules
    in_file: tuple[Matrix, ...]  # the same from the file's front to its end
    description: bytes  # see `describe`


def recipe_of(plan: Plan, tensors: Mapping[str, TensorInfo], dtype: torch.dtype, *, keeps_16_bit: bool) -> Recipe:
    """For a checkpoint that follows its plan, and a pool of `dtype`."""
    if len(tensors) > MAX_KEPT_TENSORS:
        return _recipe(plan, tensors, dtype, keeps_16_bit)
    return _recipe_once(_Same(plan), _Same(tensors), dtype, keeps_16_bit)


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
    return json.dumps(layers).encode()


class _Same:
    """Compares by identity. Of one recipe, plans and tensors are the same objects, because those too are remembered."""

    __slots__ = ("it",)

    def __init__(self, it: object) -> None:
        self.it = it

    def __hash__(self) -> int:
        return id(self.it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.it is other.it


@lru_cache(maxsize=64)
def _recipe_once(plan: _Same, tensors: _Same, dtype: torch.dtype, keeps_16_bit: bool) -> Recipe:
    return _recipe(plan.it, tensors.it, dtype, keeps_16_bit)  # type: ignore[arg-type]


def _recipe(plan: Plan, tensors: Mapping[str, TensorInfo], dtype: torch.dtype, keeps_16_bit: bool) -> Recipe:
    pairs = [pair for module in plan for pair in module.parts]
    sizes = [pair_numel(tensors, pair, keeps_16_bit=keeps_16_bit) for pair in pairs]
    a_offset, b_offset = 0, sum(a_numel for a_numel, _ in sizes)
    numels = iter(sizes)
    layout: list[tuple[str, tuple[Entry, ...]]] = []
    matrices: list[Matrix] = []
    for module in plan:
        entries: list[Entry] = []
        for pair in module.parts:
            kept = dtype_of_16_bits(tensors, pair) if keeps_16_bit else None
            held = TORCH_DTYPES[kept] if kept else dtype
            for is_a, name, offset in ((True, pair.a_name, a_offset), (False, pair.b_name, b_offset)):
                matrices.append(Matrix(name=name, stored=tensors[name], is_a=is_a, offset=offset, dtype=held))
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
    return Recipe(
        layout=tuple(layout),
        numel=b_offset,
        matrices=tuple(matrices),
        in_file=tuple(sorted(matrices, key=lambda matrix: (matrix.stored.begin, matrix.stored.end))),
        description=describe(plan, tensors),
    )
