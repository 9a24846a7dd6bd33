"""The language model that a directory holds: alone, or inside of a multimodal one, of which nothing else is read then.

Knows transformers' configurations, and not what of them is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gralora_runtime.errors import ModelUnsupportedError

# How a weight's name begins in a multimodal model, as transformers writes it today or did before 4.52; and how it does
# in the language model alone.
_BEGINNINGS: Mapping[str, str] = MappingProxyType(
    {
        r"^model\.language_model\.": "model.",
        r"^language_model\.model\.": "model.",
        r"^language_model\.lm_head\.": "lm_head.",
    }
)
# Multimodal types whose language model is one of its own, which needs nothing of the rest.
SEPARABLE = ("gemma3",)
OF_THE_WHOLE = ("tie_word_embeddings", "dtype", "eos_token_id", "quantization_config")  # what counts for its parts


def read_config(path: Path) -> Any:
    """The language model's configuration."""
    return _language_config(_whole_config(path))


def read_model(path: Path, **how: Any) -> PreTrainedModel:
    """`how`: as transformers takes it. Raises `ModelUnsupportedError` if there are not all weights."""
    whole = _whole_config(path)
    config = _language_config(whole)
    if config is not whole:
        how["key_mapping"] = dict(_BEGINNINGS)
    model: PreTrainedModel
    model, found = AutoModelForCausalLM.from_pretrained(
        path, config=config, local_files_only=True, output_loading_info=True, **how
    )
    if missing := sorted(found["missing_keys"]):  # which transformers makes up, and logs
        raise ModelUnsupportedError(
            str(path), [f"its files lack {len(missing)} of its {len(model.state_dict())} weights, such as {missing[0]}"]
        )
    return model


def _whole_config(path: Path) -> Any:
    return AutoConfig.from_pretrained(path, local_files_only=True)


def _language_config(config: Any) -> Any:
    """The inner one of a type that is separable; any other as it is."""
    if config.model_type not in SEPARABLE:
        return config
    inner = config.get_text_config()
    said = {name: getattr(config, name, None) for name in OF_THE_WHOLE}
    inner.update({name: value for name, value in said.items() if value is not None})
    return inner
