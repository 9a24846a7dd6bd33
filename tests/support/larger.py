"""Adapters with more tokens than the base model, as PEFT makes them of a model that was resized; and PEFT's answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from support.peft_adapters import gralora_config, lora_config, save_adapter
from support.tiny_models import VOCAB_SIZE, tiny_model
from transformers import PreTrainedModel

ADDED = 3
NEW = list(range(VOCAB_SIZE, VOCAB_SIZE + ADDED))  # their ids


def larger_configs(architecture: str, *, tied: bool) -> dict[str, PeftConfig]:
    """Each way in which PEFT trains added tokens, or leaves them as they came."""
    ends = ["embed_tokens", "lm_head"]
    some = {"target_modules": ["q_proj"]}
    both = {end: [5, *NEW] for end in ends}
    configs: dict[str, PeftConfig] = {
        "larger-saved": lora_config(architecture, 4, modules_to_save=ends, **some),
        "larger-blocks-saved": gralora_config(architecture, 4, 2, modules_to_save=ends, **some),
        "larger-lora": lora_config(architecture, 4, target_modules=["q_proj", *ends]),
        "larger-untrained": lora_config(architecture, 4, **some),
        "larger-tokens": lora_config(architecture, 4, trainable_token_indices=both, **some),
        "larger-new-tokens": lora_config(architecture, 4, trainable_token_indices=NEW[1:], **some),
        "larger-embedding-saved": lora_config(architecture, 4, modules_to_save=ends[:1], **some),
    }
    if tied:
        configs["larger-lora-embedding"] = lora_config(architecture, 4, target_modules=["q_proj", "embed_tokens"])
        configs["larger-lora-head"] = lora_config(architecture, 4, target_modules=["q_proj", "lm_head"])
    return configs


def resized_model(architecture: str, *, tied: bool, added: int = ADDED, seed: int = 1) -> PreTrainedModel:
    """`tiny_model` with more tokens, whose rows depend on `seed`."""
    model = tiny_model(architecture, tied=tied)
    model.resize_token_embeddings(VOCAB_SIZE + added, mean_resizing=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.weight[VOCAB_SIZE:].normal_(0.0, 0.3)
    return model


def save_larger(
    architecture: str, config: PeftConfig, folder: Path, *, tied: bool = False, added: int = ADDED, seed: int = 0
) -> Path:
    """As PEFT saves it, with all rows of the resized model."""
    model = resized_model(architecture, tied=tied, added=added)
    return save_adapter(model, config, folder, seed=seed, save_embedding_layers=True)


def peft_model(architecture: str, folder: Path, *, tied: bool = False, added: int = ADDED) -> PeftModel:
    """PEFT's, over rows of added tokens that are not those of the checkpoint: it brings all that count."""
    return PeftModel.from_pretrained(resized_model(architecture, tied=tied, added=added, seed=2), folder).eval()


def peft_logits(model: PeftModel, tokens: Sequence[int]) -> torch.Tensor:
    """Of the last token."""
    with torch.inference_mode():
        return model(torch.tensor([list(tokens)])).logits[0, -1]
