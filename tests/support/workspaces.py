"""A tiny model and its adapters on disk, as a server or an engine is given them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from support.device import DEVICE
from support.peft_adapters import save_adapter
from support.tiny_models import save_tiny_model, tiny_model

from gralora_runtime.config import EngineConfig, in_directory


def save_workspace(root: Path, adapters: Mapping[str, PeftConfig], architecture: str = "llama") -> Path:
    """`root/model`, and `root/adapters` with a directory for each; their weights differ."""
    save_tiny_model(architecture, root / "model")
    model = tiny_model(architecture)
    for seed, (name, config) in enumerate(adapters.items()):
        save_adapter(model, config, root / "adapters" / name, seed=seed)
    return root


def config_of(root: Path, **changes: Any) -> EngineConfig:
    """Of a small engine over a workspace: prompts come in chunks, and pages are a few tokens long."""
    settings: dict[str, Any] = {
        "adapters": in_directory(root / "adapters"),
        "device": DEVICE,
        "max_num_batched_tokens": 48,
        "page_size": 4,
        "kv_cache_bytes": 8 << 20,
        "adapter_pool_bytes": 8 << 20,
        "num_threads": 1,
    }
    return EngineConfig(model=root / "model", **settings | changes)
