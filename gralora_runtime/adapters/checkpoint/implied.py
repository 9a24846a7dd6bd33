"""The modules that a checkpoint was trained for, told from its tensors alone: for tools that have no model."""

from __future__ import annotations

from collections.abc import Mapping

from gralora_runtime.adapters.checkpoint.header import AdapterHeader
from gralora_runtime.adapters.checkpoint.naming import BIASES, ROWS, WEIGHTS, take_apart
from gralora_runtime.adapters.checkpoint.spec import LayerKind, ModuleShape

_PAIRS = ("lora_embedding_A", "lora_embedding_B", "lora_A.weight", "lora_B.weight", "gralora_A", "gralora_B")
ANY_VOCABULARY = 1 << 31  # rows of some tokens do not tell how many there are


def implied_shapes(header: AdapterHeader) -> list[ModuleShape]:
    """The modules that a checkpoint has tensors for, in the order of their names, as wide as those tensors are."""
    naming = header.naming()
    matrices: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in header.tensors.items():
        taken = take_apart(name)
        if taken and (module := naming.module(taken)):
            matrices.setdefault(module, {})[taken.matrix] = tensor.shape
    found = (_implied(module, shapes, BIASES[0] in shapes) for module, shapes in sorted(matrices.items()))
    return [shape for shape in found if shape is not None]


def _implied(module: str, shapes: Mapping[str, tuple[int, ...]], has_bias: bool) -> ModuleShape | None:
    """None: nothing but a bias, or another's."""
    pair = [shapes.get(name, ()) for name in _PAIRS]
    if not any(pair):
        return _replaced(module, shapes, has_bias=BIASES[1] in shapes)
    match pair:
        case (_, vocab), (hidden, _), (), (), (), ():
            return ModuleShape(module, vocab, hidden, kind=LayerKind.EMBEDDING)
        case (), (), (_, inputs), (outputs, _), (), ():
            return ModuleShape(module, inputs, outputs, has_bias=has_bias)
        case (), (), (), (), (k_a, width_a, _), (k_b, _, width_b):
            return ModuleShape(module, k_a * width_a, k_b * width_b, has_bias=has_bias)
    return ModuleShape(module, 0, 0)  # one is missing, or has another number of dimensions: it misfits its plan


def _replaced(module: str, shapes: Mapping[str, tuple[int, ...]], *, has_bias: bool) -> ModuleShape | None:
    match shapes.get(WEIGHTS[1], ()), shapes.get(ROWS, ()):
        case (outputs, inputs), _:
            return ModuleShape(module, inputs, outputs, has_bias=has_bias, kind=LayerKind.HEAD)
        case (features,), _:
            return ModuleShape(module, features, features, has_bias=has_bias, kind=LayerKind.NORM)
        case (), (_, hidden):
            return ModuleShape(module, ANY_VOCABULARY, hidden, kind=LayerKind.EMBEDDING)
    return None
