"""A mixture's experts as served: transformers' own product for each, plus what each row's adapter adds to it.

A step in which nobody has an adapter on a layer's experts runs the layer's own forward pass. Another one is computed
here, in the same order: so rows without an adapter are what they are without others', up to the rounding of products.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.experts import ExpertTable
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import ModuleTable
from gralora_runtime.model.experts import PARAMETERS, gate, matrices
from gralora_runtime.model.programs.transformers.context import StepContext


class ExpertAdapters:
    """What adapters add to routed rows, for all layers whose experts are of one size. Its backend is its own: lists of
    one grouping are not those of another."""

    def __init__(self, shapes: Sequence[tuple[int, int]], *, arena: Tensor, backend: AdapterBackend) -> None:
        """`shapes`: in_features and out_features of each parameter."""
        self._shapes = shapes
        self._arena = arena
        self._backend = backend
        self._tables: list[ExpertTable] = []
        self._grouping = Grouping(0)

    def route(
        self, stacked: Sequence[ModuleTable], slots: npt.NDArray[np.int32], experts: npt.NDArray[np.int64]
    ) -> None:
        """Before the two products of a layer: the pool's table of each parameter; each row's slot (-1: none) and
        expert."""
        self._reserve(len(slots))
        adapted, num_experts = slots >= 0, 1 + int(experts.max())
        pairs, line_of = np.unique(slots[adapted] * np.int64(num_experts) + experts[adapted], return_inverse=True)
        lines = np.full(len(slots), -1, np.int32)  # of each row
        lines[adapted] = line_of
        widths = [
            table.fill(one, pairs // num_experts, pairs % num_experts)
            for table, one in zip(self._tables, stacked, strict=True)
        ]
        self._grouping.fill(lines, dict(enumerate(np.max(widths, axis=0).tolist())))
        self._backend.prepare([table.group for table in self._tables], self._grouping)

    def apply(self, parameter: int, y: Tensor, x: Tensor) -> None:
        """y [rows, out], which the base experts made of x [rows, in], become the adapters'."""
        self._backend.apply(y, x, self._arena, self._tables[parameter].group, self._grouping)

    def _reserve(self, num_rows: int) -> None:
        """At worst each row is of an adapter and an expert of its own."""
        if num_rows > self._grouping.max_tokens:
            size = 1 << (num_rows - 1).bit_length()
            self._grouping = Grouping(size)
            self._tables = [ExpertTable(*shape, size, self._arena.device) for shape in self._shapes]


class AdaptedExperts(nn.Module):
    """In the place of a layer's experts, which are kept as they are."""

    def __init__(
        self, base: nn.Module, tables: Sequence[ModuleTable], adapters: ExpertAdapters, context: StepContext
    ) -> None:
        super().__init__()
        self.base = base
        self._stacked = tables
        self._adapters = adapters
        self._context = context

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x [tokens, hidden], and of each token its experts and their weights, [tokens, experts a token has]."""
        if not self._somebodys(len(hidden_states)):
            unadapted: Tensor = self.base(hidden_states, top_k_index, top_k_weights)
            return unadapted
        chosen = top_k_index.reshape(-1).cpu().numpy()  # [tokens * experts a token has]; a device is waited for
        order = np.argsort(chosen, kind="stable")  # rows, by expert
        experts, tokens = chosen[order], order // top_k_index.shape[1]
        self._adapters.route(self._stacked, self._context.tensors.token_slots[tokens], experts)
        rows = torch.from_numpy(order).to(hidden_states.device)
        x = hidden_states[rows // top_k_index.shape[1]]
        x = gate(self.base, self._product(0, x, experts))
        x = self._product(1, x.contiguous(), experts)
        parts = torch.empty_like(x)
        parts[rows] = x * top_k_weights.reshape(-1)[rows, None]
        return parts.view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)

    def _somebodys(self, num_tokens: int) -> bool:
        """Whether an adapter of this step is on these experts."""
        step = self._context.tensors
        if (
            num_tokens != step.grouping.num_tokens
        ):  # then nobody knows whose they are: at start, such a model is refused
            raise ValueError(f"experts read {num_tokens} rows in a step of {step.grouping.num_tokens} tokens")
        return any(table.host_index[step.grouping.slots, :, 2].any() for table in self._stacked)

    def _product(self, parameter: int, x: Tensor, experts: npt.NDArray[np.int64]) -> Tensor:
        """[rows, out], with adapters. Rows lie by expert."""
        weights = matrices(self.base, PARAMETERS[parameter])
        biases = getattr(self.base, f"{PARAMETERS[parameter]}_bias", None)
        y = x.new_empty(len(x), weights.shape[1])
        hit, starts = np.unique(experts, return_index=True)
        for expert, start, end in zip(hit.tolist(), starts.tolist(), [*starts[1:].tolist(), len(x)], strict=True):
            torch.mm(x[start:end], weights[expert].t(), out=y[start:end])
            if biases is not None:
                y[start:end] += biases[expert]
        self._adapters.apply(parameter, y, x)
        return y
