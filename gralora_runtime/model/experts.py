"""Which parameters of a mixture of experts an adapter may target: those in which all experts' matrices lie stacked.

Transformers computes such a module in one of several ways that it knows (`use_experts_implementation`): two products
for each expert, and a gate between them, which is the module's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from gralora_runtime.adapters.checkpoint.spec import LayerKind, ModuleShape

PARAMETERS = ("gate_up_proj", "down_proj")  # in the order in which the module has them, and computes


def mixtures(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have such parameters, by name."""
    return {name: module for name, module in model.named_modules() if _is_mixture(module)}


def expert_shapes(model: nn.Module) -> Iterator[ModuleShape]:
    """Every such parameter, by the dotted name that PEFT gives it."""
    for name, weights in expert_weights(model).items():
        num_experts, out_features, in_features = weights.shape
        yield ModuleShape(name, in_features, out_features, kind=LayerKind.EXPERTS, experts=num_experts)


def expert_weights(model: nn.Module) -> dict[str, Tensor]:
    """By name, as [experts, out, in], whichever way round they are stored."""
    return {
        f"{name}.{parameter}": matrices(module, parameter)
        for name, module in mixtures(model).items()
        for parameter in PARAMETERS
    }


def matrices(module: nn.Module, parameter: str) -> Tensor:
    """One parameter's, as [experts, out, in]."""
    stacked = getattr(module, parameter)
    assert isinstance(stacked, Tensor)
    return stacked.transpose(1, 2) if module.is_transposed else stacked


def gate(module: nn.Module, gates_and_ups: Tensor) -> Tensor:
    """What lies between its two products: [rows, 2 * inner] -> [rows, inner]."""
    apply: Any = module._apply_gate  # noqa: SLF001  # where each model's own is, for whoever else computes its experts
    gated: Tensor = apply(gates_and_ups)
    return gated


def _is_mixture(module: nn.Module) -> bool:
    """One of a single expert is left out: PEFT takes its parameter for a linear layer's weight."""
    is_known = getattr(module, "has_gate", False) and not getattr(module, "has_post_expert_norm", True)
    stacked = [getattr(module, parameter, None) for parameter in PARAMETERS]
    return bool(is_known) and all(isinstance(one, nn.Parameter) and one.ndim == 3 and len(one) > 1 for one in stacked)
