"""Adapters made by PEFT itself, with random weights on both sides so that each changes the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import GraloraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

# What "every linear layer" is called in each architecture of `tiny_models`.
ALL_LINEAR: dict[str, list[str] | str] = {
    "gemma3-multimodal": r".*language_model.*_proj",
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "nemotron": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "gpt-neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "opt-350m": ["project_in", "project_out", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "starcoder2": ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "glm": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
    "glm4": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
    "qwen3-moe": ["q_proj", "k_proj", "v_proj", "o_proj"],  # experts are no linear layers
    "gpt-oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "phimoe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
NOT_RANDOM = ("lora_magnitude_vector", "modules_to_save", "trainable_tokens_delta")
LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class ActivatedGraloraConfig(GraloraConfig):
    """With a key that PEFT knows of a LoRA alone."""

    alora_invocation_tokens: list[int] | None = None


def all_linear(architecture: str) -> list[str] | str:
    return ALL_LINEAR.get(architecture, LLAMA_LINEAR)


def gralora_config(architecture: str, r: int, k: int, *, hybrid_r: int = 0, **options: Any) -> GraloraConfig:
    kind = ActivatedGraloraConfig if "alora_invocation_tokens" in options else GraloraConfig
    return kind(
        r=r,
        gralora_k=k,
        hybrid_r=hybrid_r,
        alpha=options.pop("alpha", 2 * r),
        target_modules=options.pop("target_modules", all_linear(architecture)),
        init_weights=False,
        fan_in_fan_out=architecture == "gpt2",
        task_type="CAUSAL_LM",
        **options,
    )


def lora_config(architecture: str, r: int, **options: Any) -> LoraConfig:
    return LoraConfig(
        r=r,
        lora_alpha=options.pop("alpha", 2 * r),
        target_modules=options.pop("target_modules", all_linear(architecture)),
        init_lora_weights=False,
        fan_in_fan_out=architecture == "gpt2",
        task_type="CAUSAL_LM",
        **options,
    )


def save_adapter(model: PreTrainedModel, config: PeftConfig, folder: Path, *, seed: int = 0, **saving: Any) -> Path:
    """Add the adapter, save it as PEFT does, and leave the model as it was."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    with torch.no_grad(), _other_vectors(adapted):
        adapted.save_pretrained(folder, **saving)
    adapted.unload()
    return folder


@contextmanager
def _other_vectors(adapted: PeftModel) -> Iterator[None]:
    """PEFT begins with magnitudes, biases and whole modules that change nothing, and biases are the model's own."""
    vectors = [
        parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad and (name.endswith(".bias") or any(part in name for part in NOT_RANDOM))
    ]
    before = [vector.clone() for vector in vectors]
    for vector in vectors:
        vector.mul_(0.5 + torch.rand(vector.shape)).add_(torch.randn(vector.shape) / 8)
    yield
    for vector, was in zip(vectors, before, strict=True):
        vector.copy_(was)


def in_authors_dialect(folder: Path) -> Path:
    """Rewrite a saved PEFT GraLoRA config with the keys of the authors' repository; the mathematics stay the same."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["gralora_alpha"] = config.pop("alpha")
    config["r"] += config["hybrid_r"]
    path.write_text(json.dumps(config))
    return folder
