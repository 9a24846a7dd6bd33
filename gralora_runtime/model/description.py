"""What a model of Llama's build is, as data that every program reads: its sizes, and where its weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gralora_runtime.model.builds import BUILDS, Build

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
UNTURNED = "unturned"  # the rotary table of layers whose attention does not see positions

Rotary = tuple[Tensor, Tensor]  # cosines and sines, fp32 [positions, rotary_dim] each


@dataclass(frozen=True, slots=True)
class Projection:
    """Linear layers that read the same input."""

    names: tuple[str, ...]
    modules: tuple[nn.Linear, ...]


@dataclass(frozen=True, slots=True)
class Joining:
    """How what a block computes joins the stream of residuals."""

    norm: Tensor | None
    factor: float

    @property
    def is_plain(self) -> bool:
        """It is added as it is."""
        return self.norm is None and self.factor == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDescription:
    """One layer, in the order in which it is computed. Norms' weights are fp32 where they are not the model's own."""

    attention_norm: Tensor | None
    qkv: Projection
    q_norm: Tensor | None  # [head_dim], or [heads * head_dim]: of all heads together
    k_norm: Tensor | None
    rotary: str  # which of `rotary_tables`
    window: int  # 0: the whole context
    o: Projection
    attention_joining: Joining
    mlp_norm: Tensor | None
    gate_up: Projection
    down: Projection
    mlp_joining: Joining

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A whole model."""

    embedding: Tensor  # [vocab, hidden]
    embedding_factor: float
    layers: tuple[LayerDescription, ...]
    final_norm: Tensor  # scales logits, too, where they are scaled
    head: nn.Linear
    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # of attention scores
    softcap: float  # of attention scores, once scaled; 0: there is none
    logits_softcap: float  # 0: there is none
    eps: float
    activation: str  # "silu" or "gelu_tanh"

    @property
    def intermediate(self) -> int:
        return self.layers[0].down.modules[0].in_features

    @property
    def norms_whole_heads(self) -> bool:
        """Queries' and keys' norms are of all heads together."""
        norm = self.layers[0].q_norm
        return norm is not None and len(norm) != self.head_dim


class OtherBuildError(Exception):
    """This model is not of Llama's build; says why. Transformers' own forward pass can compute it."""


def describe(model: PreTrainedModel) -> Description:
    """The model's parts. Raises `OtherBuildError` for another build."""
    config = model.config
    build = BUILDS.get(type(model).__name__)
    if build is None:
        raise OtherBuildError(f"{type(model).__name__} is not of Llama's build")
    named = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))
    activation = ACTIVATIONS.get(named)
    if activation is None:
        raise OtherBuildError(f"its activation is {named}, not one of {', '.join(ACTIVATIONS)}")
    names = {module: name for name, module in model.named_modules()}
    attention = model.model.layers[0].self_attn
    heads = config.num_attention_heads
    return Description(
        embedding=model.get_input_embeddings().weight,
        embedding_factor=build.embedding_factor(config),
        layers=tuple(_layer(layer, names, config, build) for layer in model.model.layers),
        final_norm=_norm(model.model.norm, build, build.logits_factor(config)),
        head=model.get_output_embeddings(),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        softcap=build.softcap(config),
        logits_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        eps=config.rms_norm_eps,
        activation=activation,
    )


def rotary_tables(model: PreTrainedModel, description: Description, positions: int) -> Mapping[str, Rotary]:
    """The model's own cosines and sines, by what layers call theirs. All are of one width."""
    ids = torch.arange(positions, device=model.device)[None]
    like = torch.zeros(1, dtype=torch.float32, device=model.device)
    by_type = BUILDS[type(model).__name__].rotary_by_layer_type
    wanted = {layer.rotary for layer in description.layers} - {UNTURNED}
    tables = {}
    with torch.inference_mode():
        for name in wanted or {""}:
            cos, sin = model.model.rotary_emb(like, ids, *([name] if by_type else []))
            tables[name] = cos[0].contiguous(), sin[0].contiguous()
    cos, sin = next(iter(tables.values()))
    return tables | {UNTURNED: (torch.ones_like(cos), torch.zeros_like(sin))}


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), written over them; cap 0: as they are."""
    return logits if cap == 0 else logits.div_(cap).tanh_().mul_(cap)


def _layer(layer: Any, names: dict[nn.Module, str], config: Any, build: Build) -> LayerDescription:
    attention, mlp = layer.self_attn, layer.mlp
    factor = build.residual_factor(config)

    def projection(parent: Any, *candidates: str) -> Projection:
        modules = tuple(getattr(parent, name) for name in candidates if hasattr(parent, name))
        return Projection(tuple(names[module] for module in modules), modules)

    def norm(parent: Any, name: str | None) -> Tensor | None:
        return _norm(getattr(parent, name), build) if name is not None and hasattr(parent, name) else None

    return LayerDescription(
        attention_norm=norm(layer, build.before_attention),
        qkv=projection(attention, "qkv_proj", "q_proj", "k_proj", "v_proj"),
        q_norm=norm(attention, "q_norm"),
        k_norm=norm(attention, "k_norm"),
        rotary=_rotary(attention, config, build),
        window=getattr(config if build.window_of_config else attention, "sliding_window", None) or 0,
        o=projection(attention, "o_proj"),
        attention_joining=Joining(norm(layer, build.after_attention), factor),
        mlp_norm=norm(layer, build.before_mlp),
        gate_up=projection(mlp, "gate_up_proj", "gate_proj", "up_proj"),
        down=projection(mlp, "down_proj"),
        mlp_joining=Joining(norm(layer, build.after_mlp), factor),
    )


def _rotary(attention: Any, config: Any, build: Build) -> str:
    if not getattr(attention, "use_rope", True):
        return UNTURNED
    return str(config.layer_types[attention.layer_idx]) if build.rotary_by_layer_type else ""


def _norm(module: Any, build: Build, factor: float = 1.0) -> Tensor:
    weight: Tensor = module.weight.detach()
    if build.norm_offset == 0 and factor == 1:
        return weight
    return (weight.float() + build.norm_offset) * factor
