"""Which linear layers of a model an adapter may target, and their sizes, from the config alone: reads no weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gralora_runtime.adapters.spec import ModuleShape
from gralora_runtime.errors import ModelUnsupportedError
from gralora_runtime.model.adaptable import adaptable_modules


def module_shapes(model_dir: Path) -> list[ModuleShape]:
    """The shapes of the model in `model_dir`, built on the meta device: no time and no memory goes into weights."""
    if not (model_dir / "config.json").is_file():
        raise ModelUnsupportedError(str(model_dir), ["it has no config.json"])
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError) as cause:  # an unknown architecture, or one that is no causal LM
        raise ModelUnsupportedError(str(model_dir), [str(cause).splitlines()[0]]) from cause
    return [shape for shape, _ in adaptable_modules(model)]
