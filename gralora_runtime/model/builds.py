"""In what models of Llama's build differ: a line or a few for each class of transformers' that has it.

One decoder, written many times: norms, rotary attention, feed-forward, around a stream of residuals. What else differs
is read from the modules (`description.py`), and whether all was read rightly is checked at each start (`selfcheck.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

Factor = Callable[[Any], float]  # of a configuration
Switch = Callable[[Any], bool]  # of a configuration, or of an attention module


def _one(_config: Any) -> float:
    return 1.0


def _none(_config: Any) -> float:
    return 0.0


def _root_of_hidden(config: Any) -> float:
    return float(config.hidden_size**0.5)


def _no(_config: Any) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Norms are given by their names in a layer; None: there is none at that place."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None  # of what attention adds to the stream
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    norm_offset: float = 0.0  # norms scale by this + weight
    centres: bool = False  # norms subtract the mean
    parallel: Switch = _no  # a layer's feed-forward block reads what its attention reads
    gated: bool = True
    embedding_factor: Factor = _one
    residual_factor: Factor = _one  # of what a block adds to the stream
    logits_factor: Factor = _one
    softcap: Factor = _none  # of attention scores; 0: there is none
    rotary_by_layer_type: bool = False
    turns: Switch = lambda attention: getattr(attention, "use_rope", True)  # an attention module its queries and keys
    turns_neighbours: bool = False  # dimension 2 i with 2 i + 1, else i with half + i
    angles_beside: bool = False  # of its rotary tables: each twice in a row, else in two halves
    window_of_config: bool = False  # all layers have the configuration's; else each has its own, or none


_GEMMA = Build(norm_offset=1.0, embedding_factor=_root_of_hidden)
_SANDWICHED_GEMMA = replace(
    _GEMMA,
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_COHERE = Build(
    before_mlp=None,
    centres=True,
    parallel=lambda _config: True,
    turns_neighbours=True,
    angles_beside=True,
    logits_factor=lambda config: config.logit_scale,
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
        "GlmForCausalLM": Build(turns_neighbours=True),
        "Glm4ForCausalLM": Build(
            turns_neighbours=True, after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"
        ),
        "StableLmForCausalLM": Build(centres=True, parallel=lambda config: config.use_parallel_residual),
        "Starcoder2ForCausalLM": Build(centres=True, gated=False, window_of_config=True),
        "NemotronForCausalLM": Build(centres=True, gated=False, norm_offset=1.0),
        "PhiForCausalLM": Build(centres=True, gated=False, parallel=lambda _config: True, before_mlp=None),
        "CohereForCausalLM": _COHERE,
        "Cohere2ForCausalLM": replace(_COHERE, turns=lambda attention: attention.sliding_window is not None),
    }
)
