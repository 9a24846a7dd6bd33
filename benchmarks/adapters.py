"""Adapters to measure with: seeded GraLoRA checkpoints written by PEFT, and the plain LoRAs that equal them exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree

import torch
from peft import GraloraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.cost import BYTES

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHTS = "adapter_model.safetensors"
# Standard deviation of an update's output for inputs of size 1: enough to change the answer, far from breaking it.
UPDATE_SIZE = 0.3


@dataclass(slots=True)
class AdapterSet:
    """The adapters of a run, one directory each below `folder`."""

    folder: Path
    params: dict[str, int] = field(default_factory=dict)  # by name
    bytes: dict[str, int] = field(default_factory=dict)  # of the weights, as they are stored
    same_as: dict[str, str] = field(default_factory=dict)  # a converted LoRA -> the GraLoRA it was made from

    def path(self, name: str) -> Path:
        return self.folder / name

    def add_gralora(self, base: PreTrainedModel, count: int, *, rank: int, k: int) -> list[str]:
        """Write `count` adapters, each with its own seed. Returns their names and leaves `base` as it was."""
        names = [f"gralora-r{rank}-k{k}-{i:02}" for i in range(count)]
        config = GraloraConfig(r=rank, gralora_k=k, alpha=rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        adapted = get_peft_model(base, config)
        for seed, name in enumerate(names):
            self.params[name] = _randomise(adapted, seed=1000 * k + seed)
            self.bytes[name] = BYTES * self.params[name]
            adapted.save_pretrained(self.path(name))
        adapted.unload()
        return names

    def add_exact_lora(self, sources: list[str]) -> list[str]:
        """For each GraLoRA the LoRA of rank k * r that computes the same."""
        names = [source.replace("gralora", "lora-of", 1) for source in sources]
        for source, name in zip(sources, names, strict=True):
            self.params[name] = write_exact_lora(self.path(source), self.path(name))
            self.bytes[name] = BYTES * self.params[name]
            self.same_as[name] = source
        return names

    def add_bfloat16(self, sources: list[str]) -> list[str]:
        """The same adapters, rounded: as they are saved where training is in bfloat16."""
        names = [f"{source}-bfloat16" for source in sources]
        for source, name in zip(sources, names, strict=True):
            copytree(self.path(source), self.path(name))
            tensors = {key: tensor.bfloat16() for key, tensor in load_file(self.path(source) / WEIGHTS).items()}
            save_file(tensors, self.path(name) / WEIGHTS, metadata={"format": "pt"})
            self.params[name] = self.params[source]
            self.bytes[name] = self.bytes[source] // 2
        return names


def write_exact_lora(source: Path, target: Path) -> int:
    """Convert a PEFT GraLoRA checkpoint without a hybrid part. Returns the number of parameters."""
    config = json.loads((source / "adapter_config.json").read_text())
    if config["hybrid_r"]:
        raise ValueError(f"hybrid_r is {config['hybrid_r']}: only adapters without a hybrid part are converted")
    rank, k = config["r"], config["gralora_k"]
    tensors = load_file(source / WEIGHTS)
    converted: dict[str, Tensor] = {}
    for name, a in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "gralora_A":
            continue
        lora_a, lora_b = exact_lora(a, tensors[f"{module}.gralora_B"])
        converted[f"{module}.lora_A.weight"] = lora_a
        converted[f"{module}.lora_B.weight"] = lora_b
    LoraConfig(
        r=k * rank,
        lora_alpha=k * config["alpha"],  # alpha / r of either is the same
        target_modules=config["target_modules"],
        task_type=config["task_type"],
        inference_mode=True,
    ).save_pretrained(str(target))
    save_file(converted, target / WEIGHTS, metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in converted.values())


def exact_lora(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A [k, in/k, r] and B [k, r, out/k] of a GraLoRA as one plain pair, [k*r, in] and [out, k*r].

    Rank row j*r + n*s + c (s = r/k) takes column j*s + c of A's block n to row n*s + c of B's block j, which is the
    block exchange written out. Of each matrix all but a k-th is zero: that is what GraLoRA saves.
    """
    k, width, rank = a.shape
    s = rank // k
    lora_a = a.new_zeros(k, k, s, k, width)  # [j, n, c, block of in, column]
    for n in range(k):
        lora_a[:, n, :, n] = a[n].T.reshape(k, s, width)
    lora_b = b.new_zeros(k, b.shape[2], k, rank)  # [block of out, row, j, column of j]
    for j in range(k):
        lora_b[j, :, j] = b[j].T
    return lora_a.reshape(k * rank, k * width), lora_b.reshape(k * b.shape[2], k * rank)


class Merger:
    """Merged models: the base with an adapter merged into its weights by PEFT."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._scratch = deepcopy(base)

    def keep(self, adapter: Path) -> PreTrainedModel:
        """A model of its own."""
        return _merge(deepcopy(self._base), adapter)

    def borrow(self, adapter: Path) -> PreTrainedModel:
        """Valid until the next call: all of them share one model's memory."""
        self._scratch.load_state_dict(self._base.state_dict())
        return _merge(self._scratch, adapter)


def _merge(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    merged: PreTrainedModel = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return merged.eval()


def _randomise(adapted: PeftModel, *, seed: int) -> int:
    """Give both sides random values; returns the number of parameters."""
    generator = torch.Generator().manual_seed(seed)
    count = 0
    for side, tensor in _sides(adapted):
        k, rank = len(tensor), tensor.shape[2 if side == "A" else 1]
        # Each output adds r terms over in/k inputs each, s = r/k of them from each block.
        size = (k * tensor.shape[1]) ** -0.5 if side == "A" else UPDATE_SIZE * rank**-0.5
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * size)
        count += tensor.numel()
    return count


def _sides(adapted: PeftModel) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in adapted.named_parameters():
        for side in ("A", "B"):
            if f"gralora_{side}." in name:
                yield side, parameter.data
