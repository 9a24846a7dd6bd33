"""Contents of adapters by number: small, all different, and the same weights for a number whenever it is written.

Knows no names: which adapter has which content, and when, is the history's.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.catalogue.base import Base
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.adapters.checkpoint.whole import read_whole
from gralora_runtime.adapters.checkpoint.writer import write_adapter

UPDATE_SIZE = (
    0.8  # standard deviation of an update for inputs of size 1: contents that are different answer differently
)
PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Kind:
    """What an adapter is built like. k = 1 is a plain LoRA."""

    r: int
    k: int
    hybrid_r: int
    dtype: torch.dtype


_RANKS = (  # r, k, hybrid r
    (4, 1, 0), (8, 2, 0), (8, 4, 3), (16, 1, 0), (16, 4, 0), (16, 8, 0),
    (32, 2, 8), (32, 8, 0), (64, 1, 0), (64, 4, 0), (4, 4, 2), (24, 8, 5),
)  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = tuple(Kind(*ranks, dtype) for ranks in _RANKS for dtype in DTYPES)


@dataclass(frozen=True, slots=True)
class Contents:
    """All contents for one base model."""

    base: Base

    def write(self, number: int, out: Path) -> None:
        """A new adapter directory."""
        kind = KINDS[number % len(KINDS)]
        write_adapter(out, self._config(kind), dict(self._tensors(kind, torch.Generator().manual_seed(number))))

    def digest(self, directory: Path) -> str:
        """What a server calls the content that lies there."""
        return read_whole(directory, self.base.modules).digest

    def mean_bytes(self) -> int:
        """Of a content, as it is stored; a pool that keeps 16-bit weights takes as much."""
        widths = sum(outputs + inputs for outputs, inputs in self.base.targets.values())
        sizes = [(kind.r + kind.hybrid_r) * kind.dtype.itemsize for kind in KINDS]
        return widths * sum(sizes) // len(sizes)

    def _config(self, kind: Kind) -> Mapping[str, object]:
        common: dict[str, object] = {"r": kind.r, "target_modules": list(self.base.targets), "bias": "none"}
        common |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True}
        if kind.k == 1:
            return common | {"peft_type": "LORA", "lora_alpha": kind.r}
        alpha = kind.r + kind.hybrid_r  # so that the scale is 1
        return common | {"peft_type": "GRALORA", "alpha": alpha, "gralora_k": kind.k, "hybrid_r": kind.hybrid_r}

    def _tensors(self, kind: Kind, seeded: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        for module, (outputs, inputs) in self.base.targets.items():
            for name, shape, size in _shapes(kind, outputs, inputs):
                yield PREFIX + module + name, (torch.randn(shape, generator=seeded) * size).to(kind.dtype)


def put_in_place(source: Path, directory: Path) -> None:
    """Over what lies there, byte by byte, as `cp` does: who reads meanwhile may see some of both."""
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        (directory / file).write_bytes((source / file).read_bytes())
    shutil.rmtree(source)


def exchange_files(source: Path, directory: Path) -> None:
    """One file after the other, each at once."""
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        (source / file).replace(directory / file)
    source.rmdir()


def exchange_directory(source: Path, directory: Path) -> None:
    """Both files at once; for a moment there is no directory."""
    aside = source.with_name(source.name + ".old")
    directory.rename(aside)
    source.rename(directory)
    shutil.rmtree(aside)


def _shapes(kind: Kind, outputs: int, inputs: int) -> Sequence[tuple[str, tuple[int, ...], float]]:
    """Name, shape and standard deviation of a module's tensors."""
    a_size, b_size = inputs**-0.5, UPDATE_SIZE * kind.r**-0.5
    if kind.k == 1:
        return (
            (".lora_A.weight", (kind.r, inputs), a_size),
            (".lora_B.weight", (outputs, kind.r), b_size),
        )
    blocks = (
        (".gralora_A", (kind.k, inputs // kind.k, kind.r), a_size),
        (".gralora_B", (kind.k, kind.r, outputs // kind.k), b_size),
    )
    if not kind.hybrid_r:
        return blocks
    return (
        *blocks,
        (".gralora_A_general.weight", (kind.hybrid_r, inputs), a_size),
        (".gralora_B_general.weight", (outputs, kind.hybrid_r), b_size),
    )
