"""Which linear layers of a model an adapter may target, and their sizes; from the config alone, with no weights read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from gralora_runtime.adapters.spec import ModuleShape


def module_shapes(model_dir: Path) -> list[ModuleShape]:
    """The shapes of the model in `model_dir`, built on the meta device: milliseconds, and no memory for weights."""
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return shapes_of(model)


def shapes_of(model: nn.Module) -> list[ModuleShape]:
    """Every Linear and Conv1D but the output head, by the dotted name under which PEFT would address it."""
    head = model.get_output_embeddings()
    return [
        _shape(name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def _shape(name: str, module: nn.Module) -> ModuleShape:
    if isinstance(module, nn.Linear):
        out_features, in_features = module.weight.shape
        return ModuleShape(name=name, in_features=in_features, out_features=out_features, transposed=False)
    in_features, out_features = module.weight.shape  # Conv1D keeps its weight as [in, out]
    return ModuleShape(name=name, in_features=in_features, out_features=out_features, transposed=True)
