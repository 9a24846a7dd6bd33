"""The page on training: every config in it, saved by PEFT, fits the base model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import edit_config
from support.peft_adapters import save_adapter
from support.tiny_models import save_tiny_model, tiny_model

from gralora_runtime.adapters.checkpoint.header import inspect
from gralora_runtime.model.module_shapes import module_shapes

PAGE = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Of all blocks, which are run one after the other."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model("llama", tmp_path / "base")
    scope: dict[str, Any] = {"model": tiny_model("llama"), "MODEL": str(tmp_path / "base")}
    found = []
    for block in BLOCKS:
        exec(block, scope)
        if "config" in scope:
            found.append(scope.pop("config"))
    return found


def test_every_config_of_the_page_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = configs(tmp_path, monkeypatch)
    models = ["qwen3-moe" if getattr(config, "target_parameters", None) else "llama" for config in made]
    modules = {model: module_shapes(save_tiny_model(model, tmp_path / model)) for model in set(models)}
    folders = [
        save_adapter(tiny_model(model), config, tmp_path / str(at))
        for at, (model, config) in enumerate(zip(models, made, strict=True))
    ]

    assert len(made) == len(BLOCKS) - 2  # two of them train
    trained = [tmp_path / "customer-17", tmp_path / "customer-18"]
    for model, folder in zip(["llama", "llama", *models], [*trained, *folders], strict=True):
        assert inspect(folder).fits(modules[model]) == [], folder
    assert inspect(edit_config(folders[0], r=8)).fits(modules["llama"]) != []
