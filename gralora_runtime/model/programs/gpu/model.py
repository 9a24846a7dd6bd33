"""A described model's forward pass, nine launches a layer. Knows no request, no row's fate and no graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from gralora_kernels.tables import GroupTable
from gralora_kernels.triton_ops import product
from gralora_kernels.triton_ops.activation import activate
from gralora_kernels.triton_ops.adapters.launch import TritonBackend
from gralora_kernels.triton_ops.attention_launch import AttentionShape, PagedAttention
from gralora_kernels.triton_ops.norm import add_norm, norm_rows
from gralora_kernels.triton_ops.rotary import rotate_and_store
from gralora_runtime.model.adaptable import joined_weight_and_bias
from gralora_runtime.model.base_layers import BaseLayers
from gralora_runtime.model.description import Description, Joining, Norm, Projection, Rotary, soft_capped
from gralora_runtime.model.kv_pool import KVPool
from gralora_runtime.model.programs.apart import ApartStep
from gralora_runtime.model.programs.gpu.inputs import DeviceStep
from gralora_runtime.model.programs.norms import NormStep


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

    attention_norm: Norm | None
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    rotary: Rotary
    keys: Tensor
    values: Tensor
    window: int
    o: Linear
    attention_joining: Joining
    is_parallel: bool
    mlp_norm: Norm | None
    gate_up: Linear
    down: Linear
    mlp_joining: Joining


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a forward pass is made with: for any step, or for those that graphs were captured for."""

    attention: PagedAttention
    adapters: TritonBackend | None  # None: no token of the step has an adapter
    side: torch.cuda.Stream | None = None  # shrinks run there, beside the products
    apart: ApartStep = field(default_factory=ApartStep)


class GpuModel:
    """Takes the described model over: joined weights free the originals, so that one group's are held twice at most."""

    def __init__(
        self,
        model: Description,
        *,
        rotary: Mapping[str, Rotary],
        kv_pool: KVPool,
        arena: Tensor,
        groups: Mapping[tuple[str, ...], GroupTable],
        layers: BaseLayers,
        head_name: str,
        embedding_name: str,
        multiply: Product,
    ) -> None:
        self.dtype = model.embedding.dtype
        self.vocab_size = len(model.head.weight)
        self._model = model
        self._arena = arena
        self._multiply = multiply
        self._embedding = model.embedding.detach()
        # Rounded as transformers does it.
        self._factor = torch.tensor(model.embedding_factor, dtype=self.dtype).item()
        self.layers = [
            Layer(
                attention_norm=layer.attention_norm,
                qkv=_linear(layer.qkv, groups, layers),
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                rotary=rotary[layer.rotary],
                keys=kv_pool.keys[index],
                values=kv_pool.values[index],
                window=layer.window,
                o=_linear(layer.o, groups, layers),
                attention_joining=layer.attention_joining,
                is_parallel=layer.is_parallel,
                mlp_norm=layer.mlp_norm,
                gate_up=_linear(layer.gate_up, groups, layers),
                down=_linear(layer.down, groups, layers),
                mlp_joining=layer.mlp_joining,
            )
            for index, layer in enumerate(model.layers)
        ]
        self._head = model.head.weight.detach()
        self._head_bias = _detached(model.head.bias)
        layers.hold([head_name], self._head, factor=model.logits_factor)
        layers.hold([embedding_name], self._embedding)
        for norm in model.norms:
            layers.hold_norm(norm.name, offset=norm.offset, factor=norm.factor)

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

    def forward(self, step: DeviceStep, kernels: Kernels, logits: Tensor) -> Tensor:
        """logits [len(step.logits_index), vocab], in the model's dtype. Returns them, or wider ones (`ApartStep`)."""
        model = self._model
        residual = nn.functional.embedding(kernels.apart.base_ids(step.token_ids), self._embedding)
        if self._factor != 1:
            residual *= self._factor
        kernels.apart.embed(residual, step.token_ids, self._factor)
        norms = kernels.apart.norms
        normed = torch.empty_like(residual, memory_format=torch.contiguous_format)
        x: Tensor | None = None
        for layer in self.layers:
            block_input = self._join(normed, residual, x, layer.attention_norm, norms)
            attended = self._attend(layer, self._linear(layer.qkv, block_input, kernels), step, kernels)
            x = self._before_joining(self._linear(layer.o, attended, kernels), layer.attention_joining, norms)
            if layer.is_parallel:
                residual += x
            else:
                block_input = self._join(normed, residual, x, layer.mlp_norm, norms)
            gates_and_ups = self._linear(layer.gate_up, block_input, kernels)
            gated = self._new(len(normed), model.intermediate)
            activate(gated, gates_and_ups, model.activation, gated=model.is_gated)
            x = self._before_joining(self._linear(layer.down, gated, kernels), layer.mlp_joining, norms)
        last = self._new(len(logits), residual.shape[1])
        self._norm_last(last, residual, x, step.logits_index, norms)
        self._multiply(logits, last, self._head, self._head_bias)
        logits = kernels.apart.logits(logits, last)
        return soft_capped(logits, model.logits_softcap)

    def _join(
        self, normed: Tensor, residual: Tensor, x: Tensor | None, norm: Norm | None, norms: NormStep | None
    ) -> Tensor:
        """residual += x. What the next block reads: its norm, in `normed`, or itself."""
        if norm is not None:
            self._norm(normed, residual, x, norm, norms)
            return normed
        if x is not None:
            residual += x
        return residual

    def _before_joining(self, x: Tensor, joining: Joining, norms: NormStep | None) -> Tensor:
        """What is added to the residual: x, which may be written over, or its norm."""
        if joining.norm is not None:
            normed = torch.empty_like(x)
            self._norm(normed, x, None, joining.norm, norms)
            x = normed
        return x if joining.factor == 1 else x.mul_(joining.factor)

    def _norm(self, normed: Tensor, residual: Tensor, x: Tensor | None, norm: Norm, norms: NormStep | None) -> None:
        add_norm(normed, residual, x, norm.weight, self._model.eps, bias=norm.bias, centres=self._model.centres)
        for own in norms.of(norm.name).values() if norms else ():
            rows = torch.empty_like(normed[own.rows])
            self._norm_rows(rows, residual, None, own.rows, Norm(norm.name, own.weight, own.bias))
            normed[own.rows] = rows

    def _norm_last(
        self, last: Tensor, residual: Tensor, x: Tensor | None, index: Tensor, norms: NormStep | None
    ) -> None:
        norm = self._model.final_norm
        self._norm_rows(last, residual, x, index, norm)
        for own in norms.of(norm.name).values() if norms else ():
            rows = torch.empty_like(last[own.last])
            self._norm_rows(rows, residual, x, index[own.last], Norm(norm.name, own.weight, own.bias))
            last[own.last] = rows

    def _norm_rows(self, rows: Tensor, residual: Tensor, x: Tensor | None, index: Tensor, norm: Norm) -> None:
        """rows [n, hidden] = norm of (residual + x)[index]."""
        norm_rows(
            rows, residual, index, x=x, weight=norm.weight, bias=norm.bias, eps=self._model.eps,
            centres=self._model.centres,
        )  # fmt: skip

    def _turn(self, layer: Layer, qkv: Tensor, step: DeviceStep, norms: NormStep | None) -> None:
        """Queries and keys, normalised and rotated; keys and values in their pages."""
        own_q, own_k = (norms.of(norm.name) if norms and norm else {} for norm in (layer.q_norm, layer.k_norm))
        rows_of = {slot: own.rows for slot, own in (own_q | own_k).items()}
        own_qkv = {slot: qkv[rows] for slot, rows in rows_of.items()}
        base = [None if norm is None else norm.weight for norm in (layer.q_norm, layer.k_norm)]
        self._turn_rows(layer, qkv, step.positions, step.kv_slots, base)
        for slot, rows in rows_of.items():  # over what was stored of them
            weights = [own[slot].weight if slot in own else old for own, old in zip((own_q, own_k), base, strict=True)]
            self._turn_rows(layer, own_qkv[slot], step.positions[rows], step.kv_slots[rows], weights)
            qkv[rows] = own_qkv[slot]

    def _turn_rows(
        self, layer: Layer, qkv: Tensor, positions: Tensor, kv_slots: Tensor, norms: Sequence[Tensor | None]
    ) -> None:
        """`norms`: weights of the queries' and the keys'."""
        model, (q_norm, k_norm) = self._model, norms
        if model.norms_whole_heads:
            assert q_norm is not None
            assert k_norm is not None
            self._norm_whole_heads(qkv, q_norm, k_norm)
            q_norm = k_norm = None
        cos, sin = layer.rotary
        rotate_and_store(
            qkv, layer.keys, layer.values, positions, kv_slots, cos=cos, sin=sin, heads=model.heads,
            kv_heads=model.kv_heads, head_dim=model.head_dim, q_norm=q_norm, k_norm=k_norm, eps=model.eps,
            neighbours=model.turns_neighbours,
        )  # fmt: skip

    def _attend(self, layer: Layer, qkv: Tensor, step: DeviceStep, kernels: Kernels) -> Tensor:
        model, attention = self._model, kernels.attention
        self._turn(layer, qkv, step, kernels.apart.norms)
        out = self._new(len(qkv), model.heads * model.head_dim)
        attention.attend(
            out, qkv, layer.keys, layer.values, page_table=step.page_table, query_starts=step.query_starts,
            context_lens=step.context_lens, scale=model.scale, window=layer.window, softcap=model.softcap,
        )  # fmt: skip
        return out

    def _norm_whole_heads(self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor) -> None:
        """In place. By torch: the kernel of heads has one at a time in its registers, and few models have this."""
        queries = self._model.heads * self._model.head_dim
        keys = queries + self._model.kv_heads * self._model.head_dim
        for part, norm in ((qkv[:, :queries], q_norm), (qkv[:, queries:keys], k_norm)):
            part.copy_(nn.functional.rms_norm(part, norm.shape, norm.to(part.dtype), self._model.eps))

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


def _linear(projection: Projection, groups: Mapping[tuple[str, ...], GroupTable], layers: BaseLayers) -> Linear:
    weight, bias = joined_weight_and_bias(projection.modules)
    weight = weight.detach().contiguous()
    layers.hold(projection.names, weight)
    for module in projection.modules:
        module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
    return Linear(weight, _detached(bias), groups[projection.names])


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
