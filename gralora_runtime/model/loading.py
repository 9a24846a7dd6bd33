"""Reads a base model from a directory and refuses what could not be served exactly. Knows no adapters and no pages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from gralora_runtime.errors import ConfigError, ModelUnsupportedError
from gralora_runtime.model.kv_pool import kv_shape
from gralora_runtime.model.language_model import SEPARABLE, read_config, read_model
from gralora_runtime.model.refusal import refusing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}  # their angles depend on the longest sequence of the batch


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A base model as read, before anything in it is replaced."""

    model: PreTrainedModel
    chat_tokenizer: Any  # transformers' own: has the chat template
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    name: str
    digest: str  # SHA-256 over the names and sizes of its weight files and over its configuration
    max_positions: int
    num_layers: int
    num_kv_heads: int
    head_dim: int


def load_base_model(path: Path, *, device: torch.device, dtype: str) -> BaseModel:
    """Read the model. Raises `ConfigError` if it is no model directory, `ModelUnsupportedError` with all reasons."""
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} is not a Hugging Face model directory: it has no config.json")
    transformers_logging.disable_progress_bar()  # a server's log is no place for one
    with _readable(path):
        config = read_config(path)
    problems = unsupported_features(config)
    if problems:
        raise ModelUnsupportedError(str(path), problems)
    chosen = _choose_dtype(dtype, config, device)
    with refusing(str(path), config, "read"):
        # As they are written down, for the check: torch's own attention knows no soft caps and no sinks.
        model = read_model(path, dtype=chosen, attn_implementation="eager")
        chat_tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        return BaseModel(
            model=model.to(device).eval(),
            chat_tokenizer=chat_tokenizer,
            tokenizer=Tokenizer.from_str(chat_tokenizer.backend_tokenizer.to_str()),
            eos_token_ids=_eos_token_ids(path, config, chat_tokenizer),
            name=path.name,
            digest=_digest(path),
            max_positions=config.max_position_embeddings,
            **kv_shape(config),
        )


def load_as_stored(path: Path) -> PreTrainedModel:
    """A model in the dtype of its files: to be rewritten or looked at, and not to be served.

    Raises `ConfigError` if the directory is not whole, `ModelUnsupportedError` if weights are no plain numbers.
    """
    transformers_logging.disable_progress_bar()
    with _readable(path):
        if getattr(read_config(path), "quantization_config", None):
            raise ModelUnsupportedError(str(path), ["its weights are quantized"])
        return read_model(path, dtype="auto")


def load_tokenizer(path: Path) -> Any:
    """transformers' own, to be saved beside a model. Raises `ConfigError` if there is none."""
    with _readable(path):
        return AutoTokenizer.from_pretrained(path, local_files_only=True)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as cause:
        raise ConfigError(f"the model {path} cannot be read: {cause}") from cause


def unsupported_features(config: Any) -> list[str]:
    """Why a model of this configuration cannot be served exactly; empty if it can."""
    checks = {
        "encoder-decoder models are not served": getattr(config, "is_encoder_decoder", False),
        f"multimodal models are not served, but for the language models of {', '.join(SEPARABLE)}": (
            hasattr(config, "text_config") and config.model_type
        ),
        "quantized checkpoints are not served": getattr(config, "quantization_config", None),
        "attention is not causal (is_causal)": not getattr(config, "is_causal", True),
        "layers of unknown attention types (layer_types)": sorted(
            set(getattr(config, "layer_types", None) or ()) - SERVED_LAYER_TYPES
        ),
        "rotary angles that depend on the batch (rope_type)": sorted(_rope_types(config) & BATCH_DEPENDENT_ROPE),
        "attention differs by layer index (reorder_and_upcast_attn, scale_attn_by_inverse_layer_idx)": (
            getattr(config, "reorder_and_upcast_attn", False)
            or getattr(config, "scale_attn_by_inverse_layer_idx", False)
        ),
        "keys and values are compressed (kv_lora_rank)": getattr(config, "kv_lora_rank", None),
        "no multi-head attention (num_attention_heads)": not hasattr(config, "num_attention_heads"),
        "no number of positions (max_position_embeddings)": not hasattr(config, "max_position_embeddings"),
        "positions are told by biases of scores (alibi)": getattr(config, "alibi", False),
    }
    return [f"{problem}, got {value!r}" for problem, value in checks.items() if value]


def _rope_types(config: Any) -> set[str]:
    """All rotary types of a configuration; some models have one set of parameters per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(p["rope_type"]) for p in [parameters, *nested] if "rope_type" in p}


def _choose_dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        if dtype not in ("auto", "float32"):
            raise ConfigError(f"dtype must be float32 on the CPU, whose kernels compute in float32; got {dtype!r}")
        return torch.float32
    if dtype != "auto":
        return DTYPES[dtype]
    own: torch.dtype = getattr(config, "dtype", None) or torch.bfloat16
    return own if own in DTYPES.values() else torch.bfloat16


def _eos_token_ids(path: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that the model's authors let a generation end with."""
    ids: set[int] = set()
    sources = [config.eos_token_id, tokenizer.eos_token_id]
    if (path / "generation_config.json").is_file():
        sources.append(GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id)
    for source in sources:
        ids.update(source if isinstance(source, list) else [source] if source is not None else [])
    return frozenset(ids)


def _digest(path: Path) -> str:
    """Cheap identity of a checkpoint: reading gigabytes to hash them would double the time to start."""
    weights = sorted(path.glob("*.safetensors"))
    facts = {
        "config": json.loads((path / "config.json").read_text()),
        "weights": [(file.name, file.stat().st_size) for file in weights],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
