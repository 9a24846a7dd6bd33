"""Which parameters of a mixture of experts an adapter may target: those in which all experts' matrices lie stacked, and
the weight of the router that chooses among them.

Transformers computes experts in one of several ways that it knows (`use_experts_implementation`): two products for
each, and a gate between them, which is the module's own. A router is whatever makes one product with its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gralora_runtime.adapters.checkpoint.spec import LayerKind, ModuleShape

PARAMETERS = ("gate_up_proj", "down_proj")  # of experts, in the order in which the module has them, and computes


def mixtures(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have such parameters, by name."""
    return {name: module for name, module in model.named_modules() if _is_mixture(module)}


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Of these, by name."""
    found = {}
    for name, experts in mixtures(model).items():
        block, num_experts = name.rpartition(".")[0], len(matrices(experts, PARAMETERS[0]))
        for child, module in model.get_submodule(block).named_children():
            if _is_router(module, num_experts):
                found[f"{block}.{child}"] = module
    return found


def parameter_shapes(model: nn.Module) -> Iterator[ModuleShape]:
    """Every such parameter, by the dotted name that PEFT gives it."""
    for name, weights in parameter_weights(model).items():
        out_features, in_features = weights.shape[-2:]
        if weights.ndim == 2:
            yield ModuleShape(name, in_features, out_features, kind=LayerKind.ROUTER)
        else:
            yield ModuleShape(name, in_features, out_features, kind=LayerKind.EXPERTS, experts=len(weights))


def parameter_weights(model: nn.Module) -> dict[str, Tensor]:
    """By name: experts' as [experts, out, in], whichever way round they are stored, a router's as [experts, in]."""
    stacked = {
        f"{name}.{parameter}": matrices(module, parameter)
        for name, module in mixtures(model).items()
        for parameter in PARAMETERS
    }
    return stacked | {f"{name}.weight": weight_of(module) for name, module in routers(model).items()}


def weight_of(router: nn.Module) -> Tensor:
    weight = router.weight
    assert isinstance(weight, Tensor)
    return weight


class Products(TorchFunctionMode):
    """Meanwhile `change(product, x)` is called with each product of some x with this very weight."""

    def __init__(self, weight: Tensor, change: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._weight = weight
        self._change = change

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See torch."""
        del types
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and args[1] is self._weight:
            self._change(result, args[0])
        return result


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


def _is_router(module: nn.Module, num_experts: int) -> bool:
    """Whether it makes one product with a weight of its own, tried on one token. Linear layers are others."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) or not isinstance(weight, nn.Parameter) or len(weight) != num_experts:
        return False
    products: list[Tensor] = []
    with torch.no_grad(), Products(weight, lambda product, _: products.append(product)):
        module(weight.new_zeros(1, weight.shape[-1]))
    return [tuple(product.shape) for product in products] == [(1, num_experts)]
