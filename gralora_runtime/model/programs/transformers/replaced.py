"""An embedding and norms as served: the base model's, and adapters' own rows and weights. Knows no adapter by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gralora_runtime.model.programs.transformers.context import StepContext


class AdaptedEmbedding(nn.Module):
    """A row for each token. `factor`: what the base embedding multiplies its rows by."""

    def __init__(self, base: nn.Module, factor: float, context: StepContext) -> None:
        super().__init__()
        self.base = base
        self._factor = factor
        self._context = context

    def forward(self, ids: Tensor) -> Tensor:
        """ids [1, tokens] -> [1, tokens, hidden]."""
        apart = self._context.apart
        rows: Tensor = self.base(apart.base_ids(ids))
        apart.embed(rows[0], ids[0], self._factor)
        return rows


class AdaptedNorm(nn.Module):
    """A norm, computed once more for rows whose adapter has its own weight of it."""

    def __init__(self, base: nn.Module, name: str, context: StepContext) -> None:
        super().__init__()
        self.base = base
        self._name = name
        self._context = context

    def forward(self, x: Tensor) -> Tensor:
        """x [1, tokens, ...] or [tokens, ...] -> the same shape."""
        y: Tensor = self.base(x)
        norms = self._context.apart.norms
        own_norms = {} if norms is None else norms.of(self._name)
        if own_norms:
            num_tokens = self._context.tensors.grouping.num_tokens
            shape = (num_tokens, *x.shape[1 + (x.shape[0] != num_tokens) :])
            inputs, outputs = x.view(shape), y.view(shape)
            for own in own_norms.values():
                weights = {"weight": own.weight, "bias": own.bias}
                mine = {key: weights[key].to(old.dtype) for key, old in self.base.named_parameters()}
                outputs[own.rows] = torch.func.functional_call(self.base, mine, (inputs[own.rows],))
        return y
