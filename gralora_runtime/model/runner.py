"""Runs one step of the model. Owns the weights and the KV pool; knows no request, no policy and no adapter by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.tables import ModuleTable
from gralora_runtime.batch import StepTensors
from gralora_runtime.model.adaptable import adaptable_modules, replace_modules, weight_and_bias
from gralora_runtime.model.adapted_linear import AdaptedLinear, PackedLinear
from gralora_runtime.model.attention import (
    ATTENTION_NAME,
    CpuPagedAttention,
    CudaPagedAttention,
    register_attention,
)
from gralora_runtime.model.context import StepContext
from gralora_runtime.model.kv_pool import KVPool
from gralora_runtime.model.loading import BaseModel
from gralora_runtime.model.norms import fuse_rms_norms

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Computes one step."""

    def execute(self, tensors: StepTensors) -> Tensor:
        """Logits of the tokens in `logits_index`, fp32 [sampling rows, vocab]."""


class ModelRunner:
    """A base model whose linear layers ask, for each token, what its adapter adds.

    The model of `base` is taken over and changed in place: its linears are wrapped (on the CPU also repacked, which
    frees the originals), its attention reads the KV pool, its RMS norms are fused.
    """

    def __init__(
        self,
        base: BaseModel,
        kv_pool: KVPool,
        *,
        arena: Tensor,
        tables: Mapping[str, ModuleTable],
        backend: AdapterBackend,
    ) -> None:
        self._model = base.model
        self._context = StepContext()
        self._attention = _attention_for(kv_pool, self._context)
        register_attention()
        self._model.set_attn_implementation(ATTENTION_NAME)
        fused = fuse_rms_norms(self._model)
        wrapped = self._wrap_linears(arena, tables, backend)
        logger.info("model ready: %d linear layers can be adapted, %d RMS norms fused", wrapped, fused)

    def execute(self, tensors: StepTensors) -> Tensor:
        """Logits of the tokens in `logits_index`, fp32 [sampling rows, vocab]."""
        index = tensors.logits_index
        # A step of unfinished prompts wants no logits; one row of them costs less than a second way through the model.
        wanted = index if len(index) else index.new_zeros(1)
        with torch.inference_mode(), self._context.running(tensors):
            output = self._model(
                input_ids=tensors.input_ids,
                position_ids=tensors.position_ids,
                past_key_values=self._attention,
                use_cache=True,
                logits_to_keep=wanted,
                paged_attention=self._attention,
            )
        logits: Tensor = output.logits[0, : len(index)].float()
        return logits

    def _wrap_linears(self, arena: Tensor, tables: Mapping[str, ModuleTable], backend: AdapterBackend) -> int:
        pack = self._model.device.type == "cpu"
        head = self._model.get_output_embeddings()
        targets = {module: shape.name for shape, module in adaptable_modules(self._model)}

        def make(_: str, module: nn.Module) -> nn.Module | None:
            if module is head:
                return PackedLinear(*weight_and_bias(module)) if pack else None
            if module not in targets:
                return None
            base = PackedLinear(*weight_and_bias(module)) if pack else module
            table = tables[targets[module]]
            return AdaptedLinear(base, table=table, arena=arena, backend=backend, context=self._context)

        replace_modules(self._model, make)
        return len(targets)


def _attention_for(pool: KVPool, context: StepContext) -> CpuPagedAttention | CudaPagedAttention:
    kind = CpuPagedAttention if pool.keys[0].device.type == "cpu" else CudaPagedAttention
    return kind(pool, context)
