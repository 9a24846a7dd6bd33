"""An adapter merged into a model's weights: what a deployment without an adapter server serves."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from gralora_kernels.reference.adapters import gralora, unpack_a, unpack_b
from gralora_kernels.tables import Entry
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter
from gralora_runtime.model.adaptable import adaptable_modules, weight_and_bias


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, adapter: LoadedAdapter) -> None:
    """Add every update to its weight, in place. `adapter` is packed row-major, in one dtype (`ROW_MAJOR`)."""
    modules = {shape.name: (shape, module) for shape, module in adaptable_modules(model)}
    for name, entries in adapter.layout.modules:
        shape, module = modules[name]
        weight, _ = weight_and_bias(module)  # [out, in]
        for entry in entries:
            weight += update(adapter.blob, entry, shape.in_features, shape.out_features).to(weight.dtype)


def update(blob: torch.Tensor, entry: Entry, in_features: int, out_features: int) -> torch.Tensor:
    """The dense [out, in] that an entry adds: the specification, applied to the identity."""
    a = blob[entry.a_offset : entry.a_offset + entry.r * in_features].float().view(entry.r, -1)
    b = blob[entry.b_offset : entry.b_offset + entry.r * out_features].float().view(entry.r, -1)
    return gralora(torch.eye(in_features), unpack_a(a, entry.k), unpack_b(b, entry.k), entry.scale).T
