"""A tiny model and its adapters on disk, as a server or an engine is given them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import PeftConfig
from support.peft_adapters import save_adapter
from support.tiny_models import save_tiny_model, tiny_model


def save_workspace(root: Path, adapters: Mapping[str, PeftConfig], architecture: str = "llama") -> Path:
    """`root/model`, and `root/adapters` with a directory for each; their weights differ."""
    save_tiny_model(architecture, root / "model")
    model = tiny_model(architecture)
    for seed, (name, config) in enumerate(adapters.items()):
        save_adapter(model, config, root / "adapters" / name, seed=seed)
    return root
