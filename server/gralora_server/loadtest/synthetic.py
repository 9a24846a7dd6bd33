"""Adapters for load tests: as PEFT would save them, random but different from each other, as many as are wanted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gralora_runtime.errors import ConfigError
from gralora_server.loadtest.headers import weight_shapes

# Standard deviation of an update's output for inputs of size 1: it changes answers and does not break them.
UPDATE_SIZE = 0.2
# All weights are windows of one pool of random numbers: drawing anew for each adapter would take minutes.
POOL_NUMEL = 1 << 22
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."
Half = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class AdapterKind:
    """GraLoRA of rank r in k x k blocks; k = 1 is a plain LoRA. `targets`: the last parts of modules' names."""

    r: int
    k: int
    targets: tuple[str, ...] = ALL_LINEAR

    def config(self) -> dict[str, object]:
        """adapter_config.json."""
        common: dict[str, object] = {"target_modules": list(self.targets), "task_type": "CAUSAL_LM", "bias": "none"}
        common |= {"r": self.r, "base_model_name_or_path": None, "inference_mode": True}
        if self.k == 1:
            return common | {"peft_type": "LORA", "lora_alpha": self.r}
        return common | {"peft_type": "GRALORA", "alpha": self.r, "gralora_k": self.k, "hybrid_r": 0}


def parse_kinds(text: str) -> list[AdapterKind]:
    """Like r16k2 or r8k4:q_proj+v_proj, several with commas between; they take turns."""
    kinds = []
    for part in text.split(","):
        match = re.fullmatch(r"r(\d+)k(\d+)(?::([\w+]+))?", part.strip())
        if match is None or not (r := int(match[1])) or not (k := int(match[2])) or r % k:
            raise ConfigError(
                f"adapter kind {part!r} is not understood: r must be a multiple of k (example: r16k2:q_proj)"
            )
        kinds.append(AdapterKind(r, k, tuple(match[3].split("+")) if match[3] else ALL_LINEAR))
    return kinds


def make_adapters(model: Path, directory: Path, kinds: Sequence[AdapterKind], count: int, seed: int = 0) -> list[str]:
    """Write `count` adapters below `directory`, of the kinds in turn, and return their names. What is there stays.

    Raises ConfigError if a kind targets nothing in the model, its k divides no width of a target, or the disk is full.
    """
    shapes = weight_shapes(model)
    targets = {kind: _targets(kind, shapes) for kind in kinds}
    random = np.random.default_rng(seed)
    pool: Half = random.standard_normal(POOL_NUMEL, np.float32).astype(np.float16)
    names = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        name = f"synthetic-{seed}-r{kind.r}k{kind.k}x{len(targets[kind])}-{number:05}"
        # Of a seed of its own: the same however many are made.
        _write(directory / name, kind, targets[kind], pool, np.random.default_rng((seed, number)))
        names.append(name)
    return names


def _targets(kind: AdapterKind, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Module name -> (out, in)."""
    found: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        if part == "weight" and len(shape) == 2 and module.rpartition(".")[2] in kind.targets:
            found[module] = (shape[0], shape[1])
    if not found:
        raise ConfigError(f"the model has none of the target modules {', '.join(kind.targets)}")
    for module, widths in found.items():
        if any(width % kind.k for width in widths):
            raise ConfigError(f"k={kind.k} does not divide the widths of {module}, {widths[1]} to {widths[0]}")
    return found


def _write(
    folder: Path, kind: AdapterKind, targets: Mapping[str, tuple[int, int]], pool: Half, random: np.random.Generator
) -> None:
    config = folder / "adapter_config.json"
    if config.exists():  # written last
        return
    tensors: dict[str, Half] = {}
    for module, (outputs, inputs) in targets.items():
        # A: in/k inputs add up for each of r values, whatever k is; B: r values for each output.
        a, b = _window(pool, random, inputs * kind.r), _window(pool, random, outputs * kind.r)
        a, b = a * np.float16(inputs**-0.5), b * np.float16(UPDATE_SIZE * kind.r**-0.5)
        if kind.k == 1:
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a.reshape(kind.r, inputs)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = b.reshape(outputs, kind.r)
        else:
            tensors[f"{PREFIX}{module}.gralora_A"] = a.reshape(kind.k, inputs // kind.k, kind.r)
            tensors[f"{PREFIX}{module}.gralora_B"] = b.reshape(kind.k, kind.r, outputs // kind.k)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.write_text(json.dumps(kind.config(), indent=1))
    except (OSError, SafetensorError) as cause:  # thousands of them fill a disk
        raise ConfigError(f"the adapter {folder} cannot be written: {cause}") from cause


def _window(pool: Half, random: np.random.Generator, numel: int) -> Half:
    if numel >= len(pool):
        return random.standard_normal(numel, np.float32).astype(np.float16)
    start = int(random.integers(0, len(pool) - numel))
    return pool[start : start + numel]
