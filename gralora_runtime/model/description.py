"""What a model of Llama's build is, as data that every program reads: its sizes, and where its weights are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gralora_runtime.model.builds import BUILDS, Build

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "squared_relu",
}
OF_ANOTHER_BUILD = ("qk_layernorm", "use_qk_norm")  # switches of configurations: queries and keys have other norms
UNTURNED = "unturned"  # the rotary table of layers whose attention does not see positions

Rotary = tuple[Tensor, Tensor]  # cosines and sines, fp32 [positions, rotary_dim] each


@dataclass(frozen=True, slots=True)
class Norm:
    """Of rows, by the description's `eps` and `centres`. Its weight is (the module's + offset) * factor."""

    name: str
    weight: Tensor  # of queries and keys [head_dim], or [heads * head_dim]: of all heads together
    bias: Tensor | None
    offset: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Projection:
    """Linear layers that read the same input."""

    names: tuple[str, ...]
    modules: tuple[nn.Linear, ...]


@dataclass(frozen=True, slots=True)
class Joining:
    """How what a block computes joins the stream of residuals."""

    norm: Norm | None
    factor: float

    @property
    def is_plain(self) -> bool:
        """It is added as it is."""
        return self.norm is None and self.factor == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDescription:
    """One layer, in the order in which it is computed. Norms' weights are fp32 where they are not the model's own."""

    attention_norm: Norm | None
    qkv: Projection
    q_norm: Norm | None
    k_norm: Norm | None
    rotary: str  # which of `rotary_tables`
    window: int  # 0: the whole context
    o: Projection
    attention_joining: Joining
    is_parallel: bool  # the feed-forward block reads what attention read
    mlp_norm: Norm | None
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
    final_norm: Norm  # scales logits, too, where they are scaled
    head: nn.Linear
    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # of attention scores
    softcap: float  # of attention scores, once scaled; 0: there is none
    logits_factor: float  # the one that `final_norm` has in it
    logits_softcap: float  # 0: there is none
    eps: float
    centres: bool  # norms subtract the mean
    turns_neighbours: bool  # of the dimensions that rotate together, one is beside the other
    is_gated: bool  # the activation is of gates, by which the other half of the product is multiplied
    activation: str  # one of `ACTIVATIONS`

    @property
    def intermediate(self) -> int:
        return self.layers[0].down.modules[0].in_features

    @property
    def norms(self) -> Iterator[Norm]:
        """All of them."""
        for layer in self.layers:
            joinings = layer.attention_joining.norm, layer.mlp_joining.norm
            yield from filter(None, (layer.attention_norm, layer.q_norm, layer.k_norm, layer.mlp_norm, *joinings))
        yield self.final_norm

    @property
    def norms_whole_heads(self) -> bool:
        """Queries' and keys' norms are of all heads together."""
        norm = self.layers[0].q_norm
        return norm is not None and len(norm.weight) != self.head_dim


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
    others = [switch for switch in OF_ANOTHER_BUILD if getattr(config, switch, False)]
    if others:
        raise OtherBuildError(f"it has {', '.join(others)}")
    names = {module: name for name, module in model.named_modules()}
    final_norm = _named(model.model, "norm", "final_layernorm")
    attention = model.model.layers[0].self_attn
    heads = config.num_attention_heads
    return Description(
        embedding=model.get_input_embeddings().weight,
        embedding_factor=build.embedding_factor(config),
        layers=tuple(_layer(layer, names, config, build) for layer in model.model.layers),
        final_norm=_norm(final_norm, names, build, build.logits_factor(config)),
        head=model.get_output_embeddings(),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        softcap=build.softcap(config),
        logits_factor=build.logits_factor(config),
        logits_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        eps=_eps(final_norm),
        centres=build.centres,
        turns_neighbours=build.turns_neighbours,
        is_gated=build.gated,
        activation=activation,
    )


def rotary_tables(model: PreTrainedModel, description: Description, positions: int) -> Mapping[str, Rotary]:
    """The model's own cosines and sines, by what layers call theirs. All are of one width, and halves are alike."""
    ids = torch.arange(positions, device=model.device)[None]
    like = torch.zeros(1, dtype=torch.float32, device=model.device)
    build = BUILDS[type(model).__name__]
    wanted = {layer.rotary for layer in description.layers} - {UNTURNED}
    tables = {}
    with torch.inference_mode():
        for name in wanted or {""}:
            cos, sin = model.model.rotary_emb(like, ids, *([name] if build.rotary_by_layer_type else []))
            tables[name] = _in_halves(cos[0], build), _in_halves(sin[0], build)
    cos, sin = next(iter(tables.values()))
    return tables | {UNTURNED: (torch.ones_like(cos), torch.zeros_like(sin))}


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), written over them; cap 0: as they are."""
    return logits if cap == 0 else logits.div_(cap).tanh_().mul_(cap)


def _in_halves(table: Tensor, build: Build) -> Tensor:
    return table[:, ::2].repeat(1, 2) if build.angles_beside else table.contiguous()


def _layer(layer: Any, names: dict[nn.Module, str], config: Any, build: Build) -> LayerDescription:
    attention, mlp = layer.self_attn, layer.mlp
    factor = build.residual_factor(config)

    def projection(parent: Any, *candidates: str) -> Projection:
        modules = tuple(getattr(parent, name) for name in candidates if hasattr(parent, name))
        return Projection(tuple(names[module] for module in modules), modules)

    def norm(parent: Any, name: str | None) -> Norm | None:
        module = None if name is None else getattr(parent, name, None)
        return None if module is None else _norm(module, names, build)

    return LayerDescription(
        attention_norm=norm(layer, build.before_attention),
        qkv=projection(attention, "qkv_proj", "q_proj", "k_proj", "v_proj"),
        q_norm=norm(attention, "q_norm"),
        k_norm=norm(attention, "k_norm"),
        rotary=_rotary(attention, config, build),
        window=getattr(config if build.window_of_config else attention, "sliding_window", None) or 0,
        o=projection(attention, "o_proj", "dense"),
        attention_joining=Joining(norm(layer, build.after_attention), factor),
        is_parallel=build.parallel(config),
        mlp_norm=norm(layer, build.before_mlp),
        gate_up=projection(mlp, "gate_up_proj", "gate_proj", "up_proj", "c_fc", "fc1"),
        down=projection(mlp, "down_proj", "c_proj", "fc2"),
        mlp_joining=Joining(norm(layer, build.after_mlp), factor),
    )


def _rotary(attention: Any, config: Any, build: Build) -> str:
    if not build.turns(attention):
        return UNTURNED
    return str(config.layer_types[attention.layer_idx]) if build.rotary_by_layer_type else ""


def _norm(module: Any, names: dict[nn.Module, str], build: Build, factor: float = 1.0) -> Norm:
    weight: Tensor = module.weight.detach()
    bias: Tensor | None = getattr(module, "bias", None)
    if build.norm_offset != 0 or factor != 1:
        weight = (weight.float() + build.norm_offset) * factor
    if bias is not None:
        bias = bias.detach() if factor == 1 else bias.detach().float() * factor
    return Norm(names[module], weight, bias, build.norm_offset, factor)


def _eps(norm: Any) -> float:
    """All norms of a model have the same."""
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def _named(parent: Any, *candidates: str) -> Any:
    return next(getattr(parent, name) for name in candidates if hasattr(parent, name))
