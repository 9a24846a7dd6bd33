"""A described model's forward pass, nine launches a layer. Knows no request, no row's fate and no graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from gralora_kernels.tables import GroupTable
from gralora_kernels.triton_ops import product
from gralora_kernels.triton_ops.activation import gated_activation
from gralora_kernels.triton_ops.adapters.launch import TritonBackend
from gralora_kernels.triton_ops.attention_launch import AttentionShape, PagedAttention
from gralora_kernels.triton_ops.norm import add_rms_norm, rms_norm_rows
from gralora_kernels.triton_ops.rotary import rotate_and_store
from gralora_runtime.model.adaptable import joined_weight_and_bias
from gralora_runtime.model.description import Description, Projection
from gralora_runtime.model.kv_pool import KVPool
from gralora_runtime.model.programs.gpu.inputs import DeviceStep


class Product(Protocol):
    """out [tokens, out] = x [tokens, in] @ weight [out, in].T + bias [out]."""

    def __call__(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, /) -> None: ...


def fastest_product(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, /) -> None:
    """The vendor's, which sums in another order for another number of tokens."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def invariant_product(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, /) -> None:
    """A row's result is the same however many there are."""
    product.linear(out, x, weight, bias)


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """Linear layers that read the same input, as one; and where their adapters are."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    group: GroupTable


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Layer:
    """One layer's weights and pages."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    keys: Tensor
    values: Tensor
    window: int
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a forward pass is made with: for any step, or for those that graphs were captured for."""

    attention: PagedAttention
    adapters: TritonBackend | None  # None: no token of the step has an adapter
    side: torch.cuda.Stream | None = None  # shrinks run there, beside the products


class GpuModel:
    """Takes the described model over: joined weights free the originals, so that one group's are held twice at most."""

    def __init__(
        self,
        model: Description,
        *,
        rotary: tuple[Tensor, Tensor],
        kv_pool: KVPool,
        arena: Tensor,
        groups: Mapping[tuple[str, ...], GroupTable],
        multiply: Product,
    ) -> None:
        self.dtype = model.embedding.dtype
        self.vocab_size = len(model.head.weight)
        self._model = model
        self._cos, self._sin = rotary
        self._arena = arena
        self._multiply = multiply
        self._embedding = model.embedding.detach()
        # Rounded as transformers does it.
        self._factor = torch.tensor(model.embedding_factor, dtype=self.dtype).item()
        self.layers = [
            Layer(
                input_norm=layer.input_norm.detach(),
                qkv=_linear(layer.qkv, groups),
                q_norm=_detached(layer.q_norm),
                k_norm=_detached(layer.k_norm),
                keys=kv_pool.keys[index],
                values=kv_pool.values[index],
                window=layer.window,
                o=_linear(layer.o, groups),
                post_norm=layer.post_norm.detach(),
                gate_up=_linear(layer.gate_up, groups),
                down=_linear(layer.down, groups),
            )
            for index, layer in enumerate(model.layers)
        ]
        self._final_norm = model.final_norm.detach()
        self._head = model.head.weight.detach()
        self._head_bias = _detached(model.head.bias)

    def attention_shape(self, page_size: int) -> AttentionShape:
        """Of queries that lie beside their keys and values."""
        model = self._model
        return AttentionShape(
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            page_size=page_size,
            q_row=model.heads + 2 * model.kv_heads,
        )

    def forward(self, step: DeviceStep, kernels: Kernels, logits: Tensor) -> None:
        """logits [len(step.logits_index), vocab], in the model's dtype."""
        model = self._model
        residual = nn.functional.embedding(step.token_ids, self._embedding)
        if self._factor != 1:
            residual *= self._factor
        normed = torch.empty_like(residual, memory_format=torch.contiguous_format)
        x: Tensor | None = None
        for layer in self.layers:
            add_rms_norm(normed, residual, x, layer.input_norm, model.eps)
            attended = self._attend(layer, self._linear(layer.qkv, normed, kernels), step, kernels.attention)
            x = self._linear(layer.o, attended, kernels)
            add_rms_norm(normed, residual, x, layer.post_norm, model.eps)
            gates_and_ups = self._linear(layer.gate_up, normed, kernels)
            gated = self._new(len(normed), model.intermediate)
            gated_activation(gated, gates_and_ups, model.activation)
            x = self._linear(layer.down, gated, kernels)
        last = self._new(len(logits), residual.shape[1])
        rms_norm_rows(last, residual, step.logits_index, x=x, weight=self._final_norm, eps=model.eps)
        self._multiply(logits, last, self._head, self._head_bias)

    def _attend(self, layer: Layer, qkv: Tensor, step: DeviceStep, attention: PagedAttention) -> Tensor:
        model = self._model
        rotate_and_store(
            qkv, layer.keys, layer.values, step.positions, step.kv_slots, cos=self._cos, sin=self._sin,
            heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim, q_norm=layer.q_norm,
            k_norm=layer.k_norm, eps=model.eps,
        )  # fmt: skip
        out = self._new(len(qkv), model.heads * model.head_dim)
        attention.attend(
            out, qkv, layer.keys, layer.values, page_table=step.page_table, query_starts=step.query_starts,
            context_lens=step.context_lens, scale=model.scale, window=layer.window,
        )  # fmt: skip
        return out

    def _linear(self, linear: Linear, x: Tensor, kernels: Kernels) -> Tensor:
        """The base product, plus what each token's adapter adds."""
        y = self._new(len(x), len(linear.weight))
        adapters = kernels.adapters
        if adapters is None:
            self._multiply(y, x, linear.weight, linear.bias)
            return y
        side = kernels.side
        if side is None:
            adapters.shrink(x, self._arena, linear.group)
            self._multiply(y, x, linear.weight, linear.bias)
        else:
            here = torch.cuda.current_stream(side.device)
            side.wait_stream(here)
            with torch.cuda.stream(side):
                adapters.shrink(x, self._arena, linear.group)
            self._multiply(y, x, linear.weight, linear.bias)
            here.wait_stream(side)
        adapters.expand(y, self._arena, linear.group)
        return y

    def _new(self, rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=self.dtype, device=self._embedding.device)


def _linear(projection: Projection, groups: Mapping[tuple[str, ...], GroupTable]) -> Linear:
    weight, bias = joined_weight_and_bias(projection.modules)
    weight = weight.detach().contiguous()
    for module in projection.modules:
        module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
    return Linear(weight, _detached(bias), groups[projection.names])


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
