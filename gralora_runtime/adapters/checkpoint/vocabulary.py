"""How many tokens an adapter has, told from its tensors, where they are more than the base model's. Reads no file.

PEFT writes the whole embedding and output head of a model that was resized, whatever was trained of them. The rows of
the base model's tokens are copies, or trained as ever; those behind them are the added tokens'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gralora_runtime.adapters.checkpoint.naming import SAVED_AGAIN, UNDER_ROWS, UNDER_SAVED, WEIGHTS, Naming
from gralora_runtime.adapters.checkpoint.spec import ADDED, LayerKind, ModuleShape
from gralora_runtime.adapters.checkpoint.tensors import TensorInfo

_ROWS = (*WEIGHTS, UNDER_ROWS, UNDER_SAVED, SAVED_AGAIN)  # [tokens, hidden]
_ENDS = (LayerKind.EMBEDDING, LayerKind.HEAD)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Of an adapter that has more tokens than the base model."""

    size: int
    tensors: frozenset[str]  # that have a row for each


def vocabulary_of(
    tensors: Mapping[str, TensorInfo], modules: Sequence[ModuleShape], naming: Naming
) -> Vocabulary | None:
    """None: it has the base model's, or there is no room for more."""
    ends = [module for module in modules if module.kind in _ENDS]
    if len(ends) < len(_ENDS) or not any(module.kind in ADDED for module in modules):
        return None
    found = {name: size for module in ends for name, size in _sizes(tensors, module, naming)}
    size = max(found.values(), default=0)
    if not size or all(size <= num_tokens(module) for module in ends):
        return None
    return Vocabulary(size, frozenset(name for name, own in found.items() if own == size))


def num_tokens(module: ModuleShape) -> int:
    """Of an embedding or an output head."""
    return module.in_features if module.kind is LayerKind.EMBEDDING else module.out_features


def _sizes(tensors: Mapping[str, TensorInfo], module: ModuleShape, naming: Naming) -> Iterator[tuple[str, int]]:
    path = naming.path(module.name)
    pair = ("lora_embedding_A", 1) if module.kind is LayerKind.EMBEDDING else ("lora_B.weight", 0)
    for matrix, axis in (*((matrix, 0) for matrix in _ROWS), pair):
        name = naming.tensor(path, matrix)
        stored = tensors.get(name)
        if stored is not None and len(stored.shape) == 2:
            yield name, stored.shape[axis]
