"""Which layers of a model an adapter may target, and how they are replaced. Knows no step and no adapter by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gralora_runtime.adapters.checkpoint.spec import MAX_ADDED_TOKENS, LayerKind, ModuleShape, added_shapes
from gralora_runtime.model.experts import parameter_shapes, parameter_weights


def adaptable_modules(model: PreTrainedModel) -> Iterator[tuple[ModuleShape, nn.Module]]:
    """Every linear layer, by the dotted name that PEFT gives it."""
    head = model.get_output_embeddings()
    tied_to = embedding_name(model) if model.config.tie_word_embeddings else ""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:  # Phi-MoE's routers are others
            shape = ModuleShape(name, module.in_features, module.out_features, has_bias=module.bias is not None)
            yield replace(shape, kind=LayerKind.HEAD, tied_to=tied_to) if module is head else shape, module
        elif isinstance(module, Conv1D):
            yield ModuleShape(name, module.nx, module.nf, transposed=True, has_bias=True), module


def replaceable_modules(model: PreTrainedModel) -> Iterator[tuple[ModuleShape, nn.Module]]:
    """The embedding of tokens, and every norm whose weight is a vector."""
    embedding = model.get_input_embeddings()
    for name, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if module is embedding:
            vocab_size, hidden = embedding.weight.shape
            yield ModuleShape(name, vocab_size, hidden, kind=LayerKind.EMBEDDING), module
        elif "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter) and weight.ndim == 1:
            yield ModuleShape(name, len(weight), len(weight), has_bias=bias is not None, kind=LayerKind.NORM), module


def changeable_modules(model: PreTrainedModel) -> Iterator[tuple[ModuleShape, nn.Module]]:
    """All modules that an adapter may change."""
    yield from adaptable_modules(model)
    yield from replaceable_modules(model)


def changeable_shapes(model: PreTrainedModel, max_added_tokens: int = MAX_ADDED_TOKENS) -> list[ModuleShape]:
    """All that an adapter may change or add: modules, then experts, then rows of tokens that the model has not."""
    shapes = [*(shape for shape, _ in changeable_modules(model)), *parameter_shapes(model)]
    return [*shapes, *added_shapes(shapes, max_added_tokens)]


def norms_of(model: PreTrainedModel) -> list[ModuleShape]:
    return [shape for shape, _ in replaceable_modules(model) if shape.kind is LayerKind.NORM]


def head_name(model: PreTrainedModel) -> str:
    """Of the linear layer that makes logits."""
    return _name_of(model, model.get_output_embeddings())


def embedding_name(model: PreTrainedModel) -> str:
    """Of the layer that has a row for each token."""
    return _name_of(model, model.get_input_embeddings())


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A linear layer's weight as [out, in], whichever way round it is stored; an embedding's as if it were one."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    is_other_way = isinstance(module, (Conv1D, nn.Embedding))
    return weight.t() if is_other_way else weight, bias if isinstance(bias, Tensor) else None


def weight_norms(model: PreTrainedModel) -> dict[str, float]:
    """The Frobenius norm of every weight that an adapter may be added to, by module. A GPU is waited for once."""
    norms = {
        name: torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)
        for name, weight in [
            *((shape.name, weight_and_bias(module)[0]) for shape, module in adaptable_modules(model)),
            *parameter_weights(model).items(),
        ]
    }
    return dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))


def joined_weight_and_bias(modules: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Linear layers that read the same input as one: weight [sum(out), in], and a bias if any has one."""
    weights, biases = zip(*map(weight_and_bias, modules), strict=True)
    if len(modules) == 1:
        return weights[0], biases[0]
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    filled = [w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True)]
    return torch.cat(weights), torch.cat(filled)


def replace_modules(model: nn.Module, make: Callable[[str, nn.Module], nn.Module | None]) -> int:
    """Put `make(name, module)` in place of every module for which it is not None; returns how many."""
    replacements = {name: made for name, module in model.named_modules() if (made := make(name, module)) is not None}
    for name, made in replacements.items():
        model.set_submodule(name, made)
    return len(replacements)


def _name_of(model: PreTrainedModel, wanted: nn.Module) -> str:
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[wanted]
