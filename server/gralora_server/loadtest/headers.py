"""A model's tensors as its safetensors headers tell them, without reading a weight."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

from gralora_runtime.errors import ConfigError


def weight_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """By tensor name. Raises ConfigError if the directory has no safetensors file that can be read."""
    shapes = dict(_shapes(model))
    if not shapes:
        raise ConfigError(f"the model {model} has no *.safetensors files")
    return shapes


def num_parameters(model: Path) -> int:
    return sum(math.prod(shape) for shape in weight_shapes(model).values())


def shapes_digest(model: Path) -> str:
    """Twelve hexadecimal digits: models for which they are the same take the same adapters."""
    return hashlib.sha256(json.dumps(sorted(weight_shapes(model).items())).encode()).hexdigest()[:12]


def num_tied_parameters(model: Path) -> int:
    """Of the embedding, if the output head has no weights of its own; 0 otherwise."""
    shapes = weight_shapes(model)
    if any(name.startswith("lm_head.") for name in shapes):
        return 0
    return max(math.prod(shape) for shape in shapes.values() if len(shape) == 2)


def _shapes(model: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path in sorted(model.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (OSError, ValueError) as cause:
            raise ConfigError(f"{path} cannot be read as safetensors: {cause}") from cause
        yield from ((name, tuple(about["shape"])) for name, about in header.items() if name != "__metadata__")
