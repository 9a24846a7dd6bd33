"""What each key of an `adapter_config.json` stands for, and which of its values change nothing. Reads no config.

One row a key, for LoRA and for GraLoRA. PEFT passes over a key that it does not know, whatever it says. Here that takes
an operator's word: a newer PEFT, or another trainer, may have written it and mean it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OPTION = "--allow-unknown-config-key"
INVOCATION = "alora_invocation_tokens"
SAVED = "modules_to_save"
TOKENS = "trainable_token_indices"
OTHER_HEADS = ("classifier", "qa_outputs", "score")  # what PEFT saves for tasks that are no causal LM's
_MAX_CHARS = 200  # of a stranger's key in a command that is told

# The initialisations that leave the base weights as they are. The others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) train
# against changed base weights; PEFT writes True here when it converts such an adapter to a plain one on saving.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})


def is_off(value: Any) -> bool:
    """What a switch, a number or a list is that asks for nothing. 0 is not: it may be a size."""
    return value is None or value is False or value in ({}, [], "")


def _anything(_: Any) -> bool:
    return True


def _is_none_or(word: str) -> Callable[[Any], bool]:
    return lambda value: value is None or value == word


def _is_plain_init(value: Any) -> bool:
    return value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in _PLAIN_INITS)


def _names_other_heads(value: Any) -> bool:
    return isinstance(value, list) and all(name in OTHER_HEADS for name in value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key that changes nothing where its value is `neutral`, and is refused elsewhere."""

    neutral: Callable[[Any], bool] = is_off
    otherwise: str = "is not supported"  # behind the value; and what mends it
    told: str = ""  # behind a neutral value that is not off, to a person; "": it is nothing to speak of
    tells: Callable[[Any], bool] = _anything  # whether of this value


_READ = Key(neutral=_anything)  # by `spec`, which judges its value
_TRAINING = Key(neutral=_anything)  # or where it comes from, or what matters with an initialisation alone
_STAMP = Key(neutral=_anything, told="the mark of the program that trained it, which changes nothing")
_ACTIVATED = (  # `spec` reads it
    "from whose last place in a prompt on it is applied: tokens before them, and prompts without them, are the base "
    "model's"
)

_COMMON = {
    "peft_type": _READ,
    "r": _READ,
    "target_modules": _READ,
    "layers_to_transform": _READ,
    "layers_pattern": _READ,
    "task_type": Key(neutral=_is_none_or("CAUSAL_LM"), otherwise="is not supported (CAUSAL_LM is)"),
    "bias": _READ,
    SAVED: Key(  # `spec` reads it
        neutral=_anything,
        told="which are modules of other tasks, and none of this model's",
        tells=_names_other_heads,
    ),
    "auto_mapping": _TRAINING,
    "base_model_name_or_path": _TRAINING,
    "fan_in_fan_out": _TRAINING,  # PEFT overrides it by what the base layer really is, and so do we
    "inference_mode": _TRAINING,
    "peft_version": _TRAINING,
    "revision": _TRAINING,
    "lora_dtype": _STAMP,  # these three: ms-swift's
    "lorap_emb_lr": _STAMP,
    "lorap_lr_ratio": _STAMP,
    "transformers_version": _STAMP,
    "unsloth_fixed": _STAMP,
    "unsloth_version": _STAMP,
    "arrow_config": Key(otherwise="is not supported: Arrow routes each token between adapters"),
    "kasa_config": Key(otherwise="is not supported: KaSA cuts off parts of the base weights"),
    "layer_replication": Key(otherwise="is not supported: it repeats layers of the base model"),
    "megatron_config": Key(otherwise="is not supported: its layers are Megatron's"),
    "monteclora_config": Key(otherwise="is not supported: its answers are random"),
    "use_bdlora": Key(otherwise="is not supported: its matrices are block diagonal"),
    "use_qalora": Key(otherwise="is not supported: QALoRA pools what a layer reads"),
    "velora_config": Key(),
}
_OF_LORA = {
    INVOCATION: Key(neutral=_anything, told=_ACTIVATED),
    TOKENS: _READ,
    "ensure_weight_tying": _READ,
    "lora_alpha": _READ,
    "use_rslora": _READ,
    "use_dora": _READ,
    "lora_bias": _READ,
    "rank_pattern": _READ,
    "alpha_pattern": _READ,
    "exclude_modules": _READ,
    "target_parameters": _READ,
    "init_lora_weights": Key(
        neutral=_is_plain_init,
        otherwise=(
            "trains against changed base weights. Where it was trained, save it as a plain LoRA: "
            "model.save_pretrained(OUT, path_initial_model_for_weight_conversion=FIRST), FIRST being the adapter as it "
            "was saved before its training (PiSSA, OLoRA, CorDA and LoRA-GA; LoftQ has no such form)"
        ),
    ),
    "corda_config": _TRAINING,
    "eva_config": _TRAINING,
    "loftq_config": _TRAINING,
    "lora_dropout": _TRAINING,
    "lora_ga_config": _TRAINING,
    "megatron_core": _TRAINING,
    "merge_weights": _TRAINING,  # of the first PEFT: whether it adds up weights before it computes
    "qalora_group_size": _TRAINING,
    "runtime_config": _TRAINING,
}
_OF_GRALORA = {
    INVOCATION: Key(neutral=_anything, told=f"{_ACTIVATED} (PEFT does not know this of a GraLoRA)"),
    "alpha": _READ,
    "gralora_alpha": _READ,
    "gralora_k": _READ,
    "hybrid_r": _READ,
    "gralora_dropout": _TRAINING,
    "init_weights": _TRAINING,
}
NOT_BESIDE_PARAMETERS = ("use_dora", "lora_bias", "fan_in_fan_out", INVOCATION)  # target_parameters, as in PEFT
OF_THE_OTHER = Key(otherwise="is not supported in a config of this peft_type")

LORA_KEYS = dict.fromkeys(_OF_GRALORA, OF_THE_OTHER) | _COMMON | _OF_LORA
GRALORA_KEYS = dict.fromkeys(_OF_LORA, OF_THE_OTHER) | _COMMON | _OF_GRALORA
KNOWN = frozenset(LORA_KEYS) | frozenset(GRALORA_KEYS)

PASSED_OVER = Key(neutral=_anything, told=f"which is not known here and is passed over, because of {OPTION}")


def unknown(name: str) -> Key:
    """It may change the mathematics, unless it is switched off."""
    command = f"{OPTION} {name}" if len(name) <= _MAX_CHARS else OPTION
    return Key(otherwise=f"is not known here, and may change the answers ({command} passes over it, as PEFT does)")
