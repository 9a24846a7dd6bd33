"""RMS norms in one fused operation instead of six. Knows only the form that Llama-like models share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gralora_runtime.model.adaptable import replace_modules


class FusedRMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), over the last dimension."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x [..., features] -> the same shape."""
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def fuse_rms_norms(model: nn.Module) -> int:
    """Replace the norms whose result the fused one reproduces; returns how many.

    A name says nothing of the mathematics (Gemma's scales by 1 + weight), so each one is tried on random input.
    """
    return replace_modules(model, lambda _, module: _fused(module))


def _fused(module: nn.Module) -> FusedRMSNorm | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not (type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and isinstance(eps, float)):
        return None
    fused = FusedRMSNorm(weight.data, eps)
    with torch.inference_mode():
        probe = torch.randn(2, *weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
        same = torch.allclose(module(probe), fused(probe), rtol=1e-2 if weight.dtype.itemsize < 4 else 1e-5)
    return fused if same else None
