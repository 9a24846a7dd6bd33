"""Ways in which a customer's checkpoint can be bad, each made from a good one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A_WEIGHT = "base_model.model.model.layers.0.self_attn.q_proj.gralora_A"


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def _edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _poison(tensors: dict[str, Tensor]) -> None:
    tensors[A_WEIGHT][0, 3, 1] = torch.nan


def _widen(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        factor = 3 if name.endswith("_A") else 1
        tensors[name] = tensors[name].repeat(1, factor, 1)


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors[A_WEIGHT] = tensors[A_WEIGHT][:, :-1].contiguous()


BREAKAGES: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "wrong-shape": lambda folder: _edit_weights(folder, _reshape),
    "nan": lambda folder: _edit_weights(folder, _poison),
    "unknown-type": lambda folder: _edit_config(folder, peft_type="IA3"),
    "other-base": lambda folder: (
        _edit_weights(folder, _widen),
        _edit_config(folder, base_model_name_or_path="meta/some-other-model"),
    )[0],
    "unsupported": lambda folder: _edit_config(folder, bias="all", layer_replication=[[0, 1], [0, 1]]),
    "no-weights": lambda folder: (folder / WEIGHTS).unlink(),
    "not-json": lambda folder: (folder / CONFIG).write_text("{'r': 8}") and None,
}


def write_broken(good: Path, kind: str, root: Path) -> Path:
    """A copy of `good` under `root`, broken in the way called `kind` and named after it."""
    folder = Path(shutil.copytree(good, root / kind))
    BREAKAGES[kind](folder)
    return folder
