"""What a model of Llama's build is, as data that every program reads: its sizes, and where its weights are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# One pre-norm decoder, written many times: RMS norm, rotary attention, gated feed-forward. What else may differ between
# them is read from the modules, and whether it was read rightly is checked at each start (selfcheck.py).
LLAMA_LIKE = {
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM",
    "Phi3ForCausalLM",
}  # fmt: skip
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class Projection:
    """Linear layers that read the same input."""

    names: tuple[str, ...]
    modules: tuple[nn.Linear, ...]

    @property
    def has_bias(self) -> bool:
        return any(module.bias is not None for module in self.modules)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDescription:
    """One layer, in the order in which it is computed. Norms' weights are fp32 where they are not the model's own."""

    input_norm: Tensor
    qkv: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int  # 0: the whole context
    o: Projection
    post_norm: Tensor
    gate_up: Projection
    down: Projection

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A whole model."""

    embedding: Tensor  # [vocab, hidden]
    embedding_factor: float
    layers: tuple[LayerDescription, ...]
    final_norm: Tensor
    head: nn.Linear
    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # of attention scores
    eps: float
    activation: str  # "silu" or "gelu_tanh"

    @property
    def intermediate(self) -> int:
        return self.layers[0].down.modules[0].in_features


class OtherBuildError(Exception):
    """This model is not of Llama's build; says why. Transformers' own forward pass can compute it."""


def describe(model: PreTrainedModel) -> Description:
    """The model's parts. Raises `OtherBuildError` for another build."""
    config = model.config
    if type(model).__name__ not in LLAMA_LIKE:
        raise OtherBuildError(f"{type(model).__name__} is not of Llama's build")
    activation = ACTIVATIONS.get(getattr(config, "hidden_act", ""))
    if activation is None:
        raise OtherBuildError(f"its activation is {config.hidden_act}, not one of {', '.join(ACTIVATIONS)}")
    gemma = type(model).__name__ == "GemmaForCausalLM"  # its norms scale by 1 + weight, its embeddings by sqrt(hidden)
    names = {module: name for name, module in model.named_modules()}
    layers = tuple(_layer(layer, names, config, gemma) for layer in model.model.layers)
    attention = model.model.layers[0].self_attn
    heads = config.num_attention_heads
    return Description(
        embedding=model.get_input_embeddings().weight,
        embedding_factor=config.hidden_size**0.5 if gemma else 1.0,
        layers=layers,
        final_norm=_norm(model.model.norm, gemma),
        head=model.get_output_embeddings(),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        eps=config.rms_norm_eps,
        activation=activation,
    )


def rotary_tables(model: PreTrainedModel, positions: int) -> tuple[Tensor, Tensor]:
    """The model's own cosines and sines, fp32 [positions, rotary_dim] each."""
    ids = torch.arange(positions, device=model.device)[None]
    with torch.inference_mode():
        cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32, device=model.device), ids)
    return cos[0].contiguous(), sin[0].contiguous()


def _layer(layer: Any, names: dict[nn.Module, str], config: Any, gemma: bool) -> LayerDescription:
    attention, mlp = layer.self_attn, layer.mlp

    def projection(parent: Any, *candidates: str) -> Projection:
        modules = tuple(getattr(parent, name) for name in candidates if hasattr(parent, name))
        return Projection(tuple(names[module] for module in modules), modules)

    return LayerDescription(
        input_norm=_norm(layer.input_layernorm, gemma),
        qkv=projection(attention, "qkv_proj", "q_proj", "k_proj", "v_proj"),
        q_norm=_norm(attention.q_norm, gemma) if hasattr(attention, "q_norm") else None,
        k_norm=_norm(attention.k_norm, gemma) if hasattr(attention, "k_norm") else None,
        window=getattr(attention, "sliding_window", getattr(config, "sliding_window", None)) or 0,
        o=projection(attention, "o_proj"),
        post_norm=_norm(layer.post_attention_layernorm, gemma),
        gate_up=projection(mlp, "gate_up_proj", "gate_proj", "up_proj"),
        down=projection(mlp, "down_proj"),
    )


def _norm(module: Any, gemma: bool) -> Tensor:
    weight: Tensor = module.weight.detach()
    return weight.float() + 1 if gemma else weight
