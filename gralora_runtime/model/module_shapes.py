"""Sizes of a model from its config alone: the layers that adapters may change, a token's keys and values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gralora_runtime.adapters.checkpoint.spec import MAX_ADDED_TOKENS, ModuleShape
from gralora_runtime.errors import ModelUnsupportedError
from gralora_runtime.model.adaptable import changeable_shapes
from gralora_runtime.model.kv_pool import kv_shape
from gralora_runtime.model.language_model import read_config


def module_shapes(model_dir: Path, max_added_tokens: int = MAX_ADDED_TOKENS) -> list[ModuleShape]:
    """The shapes of the model in `model_dir`, built on the meta device: no time and no memory goes into weights."""
    with _unsupported(model_dir), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(model_dir))
    return changeable_shapes(model, max_added_tokens)


def vocab_size(model_dir: Path) -> int:
    """How many tokens the model in `model_dir` knows."""
    with _unsupported(model_dir):
        size: int = _config(model_dir).get_text_config().vocab_size
    return size


def kv_token_numel(model_dir: Path) -> int:
    """Elements of the keys and values of one token, in all layers."""
    with _unsupported(model_dir):
        return 2 * math.prod(kv_shape(_config(model_dir)).values())


def _config(model_dir: Path) -> Any:
    if not (model_dir / "config.json").is_file():
        raise ModelUnsupportedError(str(model_dir), ["it has no config.json"])
    return read_config(model_dir)


@contextmanager
def _unsupported(model_dir: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, AttributeError) as cause:  # an unknown architecture, or one that is no causal LM
        raise ModelUnsupportedError(str(model_dir), [str(cause).splitlines()[0]]) from cause
