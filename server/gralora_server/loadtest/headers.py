"""A model's tensors as its safetensors headers tell them, without reading a weight."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gralora_runtime.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]


def weight_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """By tensor name. Raises ConfigError if the directory has no safetensors file that can be read."""
    shapes = dict(_shapes(model))
    if not shapes:
        raise ConfigError(f"the model {model} has no *.safetensors files")
    return shapes


def num_parameters(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def shapes_digest(model: Path) -> str:
    """Twelve hexadecimal digits: models for which they are the same take the same adapters."""
    return hashlib.sha256(json.dumps(sorted(weight_shapes(model).items())).encode()).hexdigest()[:12]


def num_tied_parameters(shapes: Shapes) -> int:
    """Of the embedding, if the output head has no weights of its own; 0 otherwise."""
    if any(name.startswith("lm_head.") for name in shapes):
        return 0
    return max((math.prod(shape) for shape in shapes.values() if len(shape) == 2), default=0)


def _shapes(model: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path in sorted(model.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                yield from ((name, tuple(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as cause:
            raise ConfigError(f"{path} cannot be read as safetensors: {cause}") from cause
