"""Which layers of a model an adapter may target, and how they are replaced. Knows no step and no adapter by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gralora_runtime.adapters.checkpoint.spec import ModuleShape


def adaptable_modules(model: PreTrainedModel) -> Iterator[tuple[ModuleShape, nn.Module]]:
    """Every linear layer, by the dotted name that PEFT gives it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:  # Phi-MoE's routers are others
            has_bias = module.bias is not None
            yield ModuleShape(name, module.in_features, module.out_features, has_bias=has_bias), module
        elif isinstance(module, Conv1D):
            yield ModuleShape(name, module.nx, module.nf, transposed=True, has_bias=True), module


def head_name(model: PreTrainedModel) -> str:
    """Of the linear layer that makes logits."""
    head = model.get_output_embeddings()
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[head]


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A linear layer's weight as [out, in], whichever way round it is stored."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, Conv1D) else weight, bias if isinstance(bias, Tensor) else None


def weight_norms(model: PreTrainedModel) -> dict[str, float]:
    """The Frobenius norm of every weight that an adapter may be added to, by module. A GPU is waited for once."""
    norms = {
        shape.name: torch.linalg.vector_norm(weight_and_bias(module)[0].detach(), dtype=torch.float32)
        for shape, module in adaptable_modules(model)
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
