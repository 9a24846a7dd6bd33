"""Transformers' own forward pass with our layers in it, for models of any build. Owns the weights and the KV pool."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gralora_kernels.cpu.linear import PackedWeight
from gralora_kernels.dispatch import build_backend
from gralora_kernels.tables import GroupTable
from gralora_runtime.model.adaptable import joined_weight_and_bias, weight_and_bias
from gralora_runtime.model.experts import PARAMETERS, mixtures, routers
from gralora_runtime.model.programs.runner import Served
from gralora_runtime.model.programs.transformers.adapted_linear import (
    AdaptedGroup,
    AdaptedHead,
    AdaptedLinear,
    DenseLinear,
    PackedLinear,
)
from gralora_runtime.model.programs.transformers.attention import (
    CpuPagedAttention,
    GpuPagedAttention,
    PagedAttention,
    take_attention_over,
)
from gralora_runtime.model.programs.transformers.context import StepContext
from gralora_runtime.model.programs.transformers.experts import AdaptedExperts, AdaptedRouter, ExpertAdapters
from gralora_runtime.model.programs.transformers.norms import fuse_rms_norms
from gralora_runtime.model.programs.transformers.replaced import AdaptedEmbedding, AdaptedNorm
from gralora_runtime.stepping.batch import StepTensors

logger = logging.getLogger(__name__)


class TransformersRunner:
    """A base model whose linear layers ask, for each token, what its adapter adds.

    The served model is taken over and changed in place: its linears are wrapped (on the CPU also repacked, which
    frees the originals), its attention reads the KV pool, its RMS norms are fused.
    """

    def __init__(self, served: Served) -> None:
        base, kv_pool, groups = served.base, served.kv_pool, served.groups
        self._model = base.model
        self._context = StepContext()
        heads: int = base.model.config.num_attention_heads
        self._attention: PagedAttention = (
            CpuPagedAttention(kv_pool, self._context)
            if kv_pool.in_panels
            else GpuPagedAttention(kv_pool, self._context, heads)
        )
        take_attention_over(self._model, self._attention)
        self._wrap_replaceable(served)
        fused = fuse_rms_norms(self._model)
        self._backend = served.backend
        self._apart = served.apart
        self._groups = (*groups.values(), *self._wrap_routers(served))
        self._wrap_experts(served)
        self._wrap_linears(served)
        logger.info(
            "model ready: %d linear layers can be adapted, in %d groups, and %d parameters of experts and routers; "
            "%d RMS norms fused",
            sum(map(len, groups)),
            len(groups),
            len(served.parameters),
            fused,
        )

    def execute(self, tensors: StepTensors, newest: Tensor | None = None) -> Tensor:
        """As `Runner.execute`."""
        self._attention.prepare(tensors)
        apart = self._apart.step(tensors)
        tensors = tensors.to(self._model.device)
        input_ids = tensors.input_ids
        if newest is not None:
            chosen = newest[tensors.follows.clamp_min(0)][None].long()
            input_ids = torch.where(tensors.follows >= 0, chosen, input_ids)
        index = tensors.logits_index
        # A step of unfinished prompts wants no logits; one row of them costs less than a second way through the model.
        wanted = index if len(index) else index.new_zeros(1)
        if tensors.grouping.num_adapted:
            self._backend.prepare(self._groups, tensors.grouping)
        with torch.inference_mode(), self._context.running(tensors, apart):
            output = self._model(
                input_ids=input_ids,
                position_ids=tensors.position_ids,
                past_key_values=self._attention,
                use_cache=True,
                logits_to_keep=wanted,
            )
            return apart.hide(output.logits[0, : len(index)].float())

    def _wrap_replaceable(self, served: Served) -> None:
        embedding = self._model.get_input_embeddings()
        served.layers.hold([served.embedding_name], embedding.weight.detach())
        factor = float(getattr(embedding, "embed_scale", 1.0))
        self._model.set_submodule(served.embedding_name, AdaptedEmbedding(embedding, factor, self._context))
        for name in served.apart.norm_tables:
            norm = self._model.get_submodule(name)
            self._model.set_submodule(name, AdaptedNorm(norm, name, self._context))

    def _wrap_routers(self, served: Served) -> list[GroupTable]:
        tables = []
        for name, module in routers(self._model).items():
            tables.append(served.parameters[f"{name}.weight"])
            router = AdaptedRouter(
                module, table=tables[-1], arena=served.arena, backend=self._backend, context=self._context
            )
            self._model.set_submodule(name, router)
        return tables

    def _wrap_experts(self, served: Served) -> None:
        """Those of one size share what they are adapted by."""
        adapters: dict[tuple[tuple[int, int], ...], ExpertAdapters] = {}
        for name, module in mixtures(self._model).items():
            tables = [served.parameters[f"{name}.{parameter}"].modules[0] for parameter in PARAMETERS]
            shapes = tuple((table.in_features, table.out_features) for table in tables)
            if shapes not in adapters:
                backend = build_backend(self._backend.name, self._model.device)
                adapters[shapes] = ExpertAdapters(shapes, arena=served.arena, backend=backend)
            self._model.set_submodule(name, AdaptedExperts(module, tables, adapters[shapes], self._context))

    def _wrap_linears(self, served: Served) -> None:
        """Group by group, so that at most one group's weights are held twice."""
        pack = self._model.device.type == "cpu"
        head = self._model.get_output_embeddings()
        base, weight = _base_product([head], pack=pack, least_bits=served.least_bits)
        served.layers.hold([served.head_name], weight)
        self._model.set_output_embeddings(AdaptedHead(base, self._context))
        for names, table in served.groups.items():
            modules = [self._model.get_submodule(name) for name in names]
            base, weight = _base_product(modules, pack=pack, least_bits=served.least_bits)
            served.layers.hold(names, weight)
            group = AdaptedGroup(base, table=table, arena=served.arena, backend=self._backend, context=self._context)
            for member, name in enumerate(names):
                self._model.set_submodule(name, AdaptedLinear(group, member))


def _base_product(
    modules: Sequence[nn.Module], *, pack: bool, least_bits: int
) -> tuple[nn.Module, PackedWeight | Tensor]:
    """And the weight [out, in] that it is made with."""
    if pack:
        packed = PackedLinear(*joined_weight_and_bias(modules), least_bits=least_bits)
        return packed, packed.weight
    if len(modules) == 1:
        return modules[0], weight_and_bias(modules[0])[0].detach()
    dense = DenseLinear(*joined_weight_and_bias(modules))
    return dense, dense.weight.detach()
