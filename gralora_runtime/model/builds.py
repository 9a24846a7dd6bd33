"""In what models of Llama's build differ: a line or a few for each class of transformers' that has it.

One decoder, written many times: RMS norms, rotary attention, gated feed-forward, around a stream of residuals. What
else differs is read from the modules (`description.py`), and whether all was read rightly is checked at each start
(`selfcheck.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

Factor = Callable[[Any], float]  # of a configuration


def _one(_config: Any) -> float:
    return 1.0


def _none(_config: Any) -> float:
    return 0.0


def _root_of_hidden(config: Any) -> float:
    return float(config.hidden_size**0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Norms are given by their names in a layer; None: there is none at that place."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None  # of what attention adds to the stream
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    norm_offset: float = 0.0  # norms scale by this + weight
    embedding_factor: Factor = _one
    residual_factor: Factor = _one  # of what a block adds to the stream
    logits_factor: Factor = _one
    softcap: Factor = _none  # of attention scores; 0: there is none
    rotary_by_layer_type: bool = False
    window_of_config: bool = False  # all layers have the configuration's; else each has its own, or none


_GEMMA = Build(norm_offset=1.0, embedding_factor=_root_of_hidden)
_SANDWICHED_GEMMA = replace(
    _GEMMA,
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_OLMO = Build(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
BUILDS: Mapping[str, Build] = MappingProxyType(
    {
        "LlamaForCausalLM": Build(),
        "MistralForCausalLM": Build(window_of_config=True),
        "Qwen2ForCausalLM": Build(),
        "Qwen3ForCausalLM": Build(),
        "Phi3ForCausalLM": Build(window_of_config=True),
        "SmolLM3ForCausalLM": Build(),
        "GraniteForCausalLM": Build(
            embedding_factor=lambda config: config.embedding_multiplier,
            residual_factor=lambda config: config.residual_multiplier,
            logits_factor=lambda config: 1 / config.logits_scaling,
        ),
        "Olmo2ForCausalLM": _OLMO,
        "Olmo3ForCausalLM": replace(_OLMO, rotary_by_layer_type=True),
        "GemmaForCausalLM": _GEMMA,
        "Gemma2ForCausalLM": replace(_SANDWICHED_GEMMA, softcap=lambda config: config.attn_logit_softcapping or 0.0),
        "Gemma3ForCausalLM": replace(_SANDWICHED_GEMMA, rotary_by_layer_type=True),
    }
)
