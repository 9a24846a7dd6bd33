"""Linear layers as served: the base product, plus what each token's adapter adds. Knows no adapter by name."""

from __future__ import annotations

from torch import Tensor, nn

from gralora_kernels.cpu.linear import PackedWeight, linear
from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.tables import ModuleTable
from gralora_runtime.model.context import StepContext


class PackedLinear(nn.Module):
    """fp32 linear on the CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight = PackedWeight(weight)
        self._bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        out = x.new_empty(*x.shape[:-1], self.out_features)
        linear(out, x.contiguous(), self._weight, self._bias)
        return out


class AdaptedLinear(nn.Module):
    """A base linear that adapters may target."""

    def __init__(
        self, base: nn.Module, *, table: ModuleTable, arena: Tensor, backend: AdapterBackend, context: StepContext
    ) -> None:
        super().__init__()
        self.base = base
        self._table = table
        self._arena = arena
        self._backend = backend
        self._context = context

    def forward(self, x: Tensor) -> Tensor:
        """x [1, tokens, in] -> [1, tokens, out]; rows without an adapter are the base product, bit for bit."""
        y: Tensor = self.base(x)
        grouping = self._context.tensors.grouping
        if grouping.num_adapted:
            self._backend.apply(y[0], x[0].contiguous(), self._arena, self._table, grouping)
        return y
