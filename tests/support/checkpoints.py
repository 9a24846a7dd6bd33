"""Adapter directories with random weights, written by hand: no PEFT and no transformers, so a test can make hundreds.

`peft_adapters.py` has the ones that PEFT itself writes; the tests hold the two against each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE

# Two layers of a toy model: widths that k = 2 and 4 divide, and that differ between input and output.
MODULES = (
    ModuleShape("model.layers.0.self_attn.q_proj", 32, 32),
    ModuleShape("model.layers.0.self_attn.v_proj", 32, 16),
    ModuleShape("model.layers.0.mlp.down_proj", 48, 32),
    ModuleShape("model.layers.1.self_attn.q_proj", 32, 32),
    ModuleShape("model.layers.1.self_attn.v_proj", 32, 16),
    ModuleShape("model.layers.1.mlp.down_proj", 48, 32),
)
TARGETS = ("q_proj", "v_proj", "down_proj")

# As PEFT 0.21.2 writes them.
GRALORA_DEFAULTS: dict[str, Any] = {
    "alpha": 64,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "gralora_dropout": 0.0,
    "gralora_k": 2,
    "hybrid_r": 0,
    "inference_mode": True,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_type": "GRALORA",
    "peft_version": "0.21.2",
    "r": 32,
    "revision": None,
    "target_modules": list(TARGETS),
    "task_type": "CAUSAL_LM",
}
LORA_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": list(TARGETS),
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


def gralora_config(
    *, r: int = 8, k: int = 2, hybrid_r: int = 0, authors: bool = False, **changes: Any
) -> dict[str, Any]:
    """A config; `r` is the rank of the blocks, whichever way the dialect writes it down."""
    config = {**GRALORA_DEFAULTS, "r": r, "gralora_k": k, "hybrid_r": hybrid_r, "alpha": 16}
    if authors:
        config |= {"r": r + hybrid_r, "gralora_alpha": config.pop("alpha")}
        for key in ("init_weights", "peft_version"):  # the fork is older than these
            del config[key]
    return {**config, **changes}


def lora_config(*, r: int = 4, **changes: Any) -> dict[str, Any]:
    return {**LORA_DEFAULTS, "r": r, "lora_alpha": 16, **changes}


def gralora_tensors(
    modules: Sequence[ModuleShape] = MODULES, *, r: int = 8, k: int = 2, hybrid_r: int = 0, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for module in modules:
        prefix = f"base_model.model.{module.name}"
        shapes = {
            "gralora_A": (k, module.in_features // k, r),
            "gralora_B": (k, r, module.out_features // k),
        }
        if hybrid_r:
            shapes["gralora_A_general.weight"] = (hybrid_r, module.in_features)
            shapes["gralora_B_general.weight"] = (module.out_features, hybrid_r)
        tensors |= {f"{prefix}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors


def lora_tensors(modules: Sequence[ModuleShape] = MODULES, *, r: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for module in modules:
        prefix = f"base_model.model.{module.name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(r, module.in_features, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(module.out_features, r, generator=generator)
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return folder


def write_gralora(
    folder: Path,
    modules: Sequence[ModuleShape] = MODULES,
    *,
    r: int = 8,
    k: int = 2,
    hybrid_r: int = 0,
    seed: int = 0,
    authors: bool = False,
    **config_changes: Any,
) -> Path:
    config = gralora_config(r=r, k=k, hybrid_r=hybrid_r, authors=authors, **config_changes)
    return write_checkpoint(folder, config, gralora_tensors(modules, r=r, k=k, hybrid_r=hybrid_r, seed=seed))


def write_lora(
    folder: Path, modules: Sequence[ModuleShape] = MODULES, *, r: int = 4, seed: int = 0, **config_changes: Any
) -> Path:
    return write_checkpoint(folder, lora_config(r=r, **config_changes), lora_tensors(modules, r=r, seed=seed))


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Load the weights, let `change` alter the dict in place, and save them."""
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return folder
