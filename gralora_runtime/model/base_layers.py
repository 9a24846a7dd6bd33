"""What an adapter's vectors and rows are relative to: a linear layer's bias, its weight's rows and how long they are; a
norm's weight.

Programs free the model's own weights, so each tells here where it holds them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gralora_kernels.cpu.linear import PackedWeight
from gralora_kernels.cpu.packed_rows import PackedRows, row_norms, rows_of
from gralora_kernels.packing import Array
from gralora_runtime.adapters.checkpoint.affine import BaseNorm
from gralora_runtime.adapters.checkpoint.spec import LayerKind
from gralora_runtime.model.adaptable import adaptable_modules, replaceable_modules, weight_and_bias

ROWS = 1024  # of a weight that are looked at together


@dataclass(frozen=True, slots=True)
class _Held:
    """A module's weight: rows of one that may be several modules'."""

    weight: PackedWeight | PackedRows | Tensor
    first: int
    factor: float


class BaseLayers:
    """Of one model. Who asks for norms before `open` waits."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._num_rows: dict[str, int] = {}
        self._biases: dict[str, Array] = {}
        self._held: dict[str, _Held] = {}
        self._norms: dict[str, BaseNorm] = {}
        self._is_open = threading.Event()
        for shape, module in adaptable_modules(model):
            self._num_rows[shape.name] = shape.out_features
            if (bias := weight_and_bias(module)[1]) is not None:
                self._biases[shape.name] = _fp32(bias)
        for shape, module in replaceable_modules(model):
            self._num_rows[shape.name] = shape.in_features
            if shape.kind is LayerKind.NORM:
                weight, bias = weight_and_bias(module)
                self._norms[shape.name] = BaseNorm(_fp32(weight), None if bias is None else _fp32(bias))

    def hold(self, modules: Sequence[str], weight: PackedWeight | PackedRows | Tensor, *, factor: float = 1.0) -> None:
        """These modules' weights lie here, one below the other: [sum(out), in]. `factor`: see the method."""
        first = 0
        for module in modules:
            self._held[module] = _Held(weight, first, factor)
            first += self._num_rows[module]

    def hold_norm(self, module: str, *, offset: float, factor: float) -> None:
        """See `BaseNorm`."""
        self._norms[module] = replace(self._norms[module], offset=offset, factor=factor)

    def open(self) -> None:
        """All have said where weights are, or nobody will."""
        self._is_open.set()

    def bias(self, module: str) -> Array | None:
        """fp32 [out]."""
        return self._biases.get(module)

    def factor(self, module: str) -> float:
        """What its input was scaled by, so that its output is scaled, too."""
        return self._find(module).factor

    def norms(self, module: str, a: Array, b: Array) -> Array:
        """Of each row of W + b @ a, for fp32 a [r, in] and b [out, r]: float64 [out]."""
        held = self._find(module)
        if isinstance(held.weight, PackedWeight):
            return row_norms(held.weight, held.first, a, b)
        assert isinstance(held.weight, Tensor), "an embedding has no norms of rows"
        weight = held.weight[held.first : held.first + len(b)]
        return _norms(weight, torch.from_numpy(a).to(weight.device), torch.from_numpy(b).to(weight.device))

    def rows(self, module: str, first: int, count: int) -> Array:
        """Of W: fp32 [count, in]; of an embedding [count, hidden]."""
        held = self._find(module)
        first += held.first
        if isinstance(held.weight, PackedWeight):
            return rows_of(held.weight, first, count)
        if isinstance(held.weight, PackedRows):
            return held.weight.rows(first, count)
        return _fp32(held.weight[first : first + count])

    def norm(self, module: str) -> BaseNorm:
        """As the program computes it."""
        self._is_open.wait()
        return self._norms[module]

    def _find(self, module: str) -> _Held:
        self._is_open.wait()
        return self._held[module]


def _fp32(tensor: Tensor) -> Array:
    found: Array = tensor.detach().float().cpu().numpy()
    return found


def _norms(weight: Tensor, a: Tensor, b: Tensor) -> Array:
    parts = [
        torch.linalg.vector_norm(torch.addmm(rows.float(), some, a), dim=1, dtype=torch.float64)
        for rows, some in zip(weight.split(ROWS), b.split(ROWS), strict=True)  # type: ignore[no-untyped-call]
    ]
    found: Array = torch.cat(parts).cpu().numpy()
    return found
