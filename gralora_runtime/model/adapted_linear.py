"""Linear layers as served: the base product, plus what each token's adapter adds. Knows no adapter by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.tables import ModuleTable
from gralora_runtime.model.context import StepContext

# oneDNN packs for one number of rows, but the layout serves all others: packed for 16 it was level with exact packing
# at 1..128 rows, and 1.2 - 5.5x faster than F.linear at 4..32 rows (SmolLM2's shapes, 2 cores, AVX-512).
PACKED_FOR_ROWS = 16


class PackedLinear(nn.Module):
    """fp32 linear on the CPU with its weight in oneDNN's own blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)  # noqa: SLF001

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")  # noqa: SLF001
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
