"""Attention over paged keys and values, in the two forms that transformers asks for: a cache object that takes the new
keys and values, and a function that attends. One `PagedAttention` serves one runner; nothing is global but its name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from gralora_kernels.cpu.attention import paged_attention
from gralora_runtime.errors import ModelUnsupportedError
from gralora_runtime.model.kv_pool import KVPool
from gralora_runtime.model.programs.transformers.context import StepContext
from gralora_runtime.stepping.batch import StepTensors

ATTENTION_NAME = "gralora_paged"
UNSUPPORTED = ("position_bias",)  # arguments of attention functions
UNTOLD = -1  # a window that an attention function was not told of


@dataclass(frozen=True, slots=True)
class Limits:
    """What a layer does to its scores. Window 0: the whole context; softcap 0: there is none. `sinks` [heads]: a score
    of each head that has no value."""

    scale: float
    window: int
    softcap: float
    sinks: Tensor | None


class PagedAttention(ABC):
    """`past_key_values` and attention function of one model, over one KV pool."""

    def __init__(self, pool: KVPool, context: StepContext) -> None:
        self._pool = pool
        self._context = context

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the step's new keys and values, both [1, kv_heads, tokens, head_dim]."""
        slots = self._context.tensors.kv_slots
        self._pool.write(layer_idx, slots, keys[0].transpose(0, 1), values[0].transpose(0, 1))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Unused: positions are always given."""
        del layer_idx
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Unused: no mask is built."""
        del layer_idx
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Unused: no mask is built."""
        del layer_idx
        return query_length, 0

    @abstractmethod
    def prepare(self, step: StepTensors) -> None:
        """Before the forward pass, with the step in host memory."""

    def attend(self, layer: int, query: Tensor, limits: Limits) -> Tensor:
        """query [1, heads, tokens, head_dim] -> [1, tokens, heads, head_dim]."""
        return self._attend(self._context.tensors, layer, query[0].transpose(0, 1).contiguous(), limits)[None]

    @abstractmethod
    def _attend(self, step: StepTensors, layer: int, query: Tensor, limits: Limits) -> Tensor:
        """query [tokens, heads, head_dim] -> the same shape."""


class CpuPagedAttention(PagedAttention):
    """Decode and prompt rows alike read the pages where they lie."""

    def prepare(self, step: StepTensors) -> None:
        """The step is read where it is."""

    def _attend(self, step: StepTensors, layer: int, query: Tensor, limits: Limits) -> Tensor:
        out = torch.empty_like(query)
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        paged_attention(
            out, query, keys, values, step.page_table, step.query_starts, step.context_lens, limits.scale,
            limits.window, limits.softcap, limits.sinks,
        )  # fmt: skip
        return out


class GpuPagedAttention(PagedAttention):
    """Our own kernels, which take any page size, dtype and width of heads."""

    def __init__(self, pool: KVPool, context: StepContext, heads: int) -> None:
        from gralora_kernels.triton_ops.attention_launch import AttentionShape
        from gralora_kernels.triton_ops.attention_launch import PagedAttention as Kernels

        super().__init__(pool, context)
        _, page_size, kv_heads, head_dim = pool.keys[0].shape
        shape = AttentionShape(
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, q_row=heads
        )  # fmt: skip
        self._kernels = Kernels(shape, pool.keys[0].dtype, pool.keys[0].device, invariant=False)

    def prepare(self, step: StepTensors) -> None:
        """Before the forward pass, with the step in host memory."""
        self._kernels.prepare(step.query_starts.numpy(), step.context_lens.numpy())

    def _attend(self, step: StepTensors, layer: int, query: Tensor, limits: Limits) -> Tensor:
        out = torch.empty_like(query)
        self._kernels.attend(
            out.flatten(1), query.flatten(1), self._pool.keys[layer], self._pool.values[layer],
            page_table=step.page_table, query_starts=step.query_starts, context_lens=step.context_lens,
            scale=limits.scale, window=limits.window, softcap=limits.softcap, sinks=limits.sinks,
        )  # fmt: skip
        return out


def take_attention_over(model: PreTrainedModel, attention: PagedAttention) -> None:
    """Each layer of the model attends by way of `attention` from now on. Without a mask function of our name
    transformers builds no mask at all, which is right: the page table is the mask."""
    AttentionInterface.register(ATTENTION_NAME, _attention_function)
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:  # noqa: SLF001  # transformers logs it, and goes on
        raise ModelUnsupportedError(
            type(model).__name__, ["its layers compute attention by themselves, which lets nobody else do it"]
        )
    for module in model.modules():  # not by an argument, which some models' layers do not hand on
        if not getattr(module, "is_causal", True):
            raise ModelUnsupportedError(type(model).__name__, ["its attention is not causal (is_causal)"])
        if hasattr(module, "layer_idx"):
            module.paged_attention = attention


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = UNTOLD,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unsupported: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer. `key` and `value` are in the pool already."""
    del key, value
    # Each would change the result. The check at start calls this, so such a model is refused before it serves.
    asked_for = {"attention_mask": attention_mask} | {name: unsupported.get(name) for name in UNSUPPORTED}
    problems = [f"its attention uses {name}" for name, value in asked_for.items() if value is not None]
    if sliding_window == UNTOLD:
        sliding_window = None
        if _has_window(module):  # in its mask alone, of which we see nothing
            problems.append("its attention is not told of its window (sliding_window)")
    if problems:
        raise ModelUnsupportedError(type(module).__name__, problems)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    attention: PagedAttention = module.paged_attention  # type: ignore[assignment]
    return attention.attend(layer, query, Limits(scale, sliding_window or 0, softcap or 0.0, s_aux)), None


def _has_window(module: nn.Module) -> bool:
    """By its configuration. Layers of several types have theirs where their type says so."""
    config: Any = getattr(module, "config", None)
    if not getattr(config, "sliding_window", None):
        return False
    types = getattr(config, "layer_types", None)
    return types is None or types[module.layer_idx] == "sliding_attention"
