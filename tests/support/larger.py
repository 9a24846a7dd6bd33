"""Adapters with more tokens than the base model, as PEFT makes them of a model that was resized; and PEFT's answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from support.peft_adapters import gralora_config, lora_config, save_adapter
from support.served import PROMPT
from support.tiny_models import VOCAB_SIZE, tiny_model
from support.workspaces import config_of
from transformers import PreTrainedModel

from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.request import Delta, GenerationRequest, Prompt, SamplingParams, StoppingParams
from gralora_runtime.stream import merge_deltas

ADDED = 3
NEW = list(range(VOCAB_SIZE, VOCAB_SIZE + ADDED))  # their ids
BOTH = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}
NUM_TOKENS = 8  # of an answer
FROM_NEW = [*PROMPT[:6], *NEW]  # a prompt
GREEDY = SamplingParams(temperature=0.0)


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


def save_loud(folder: Path) -> Path:
    """The logits of added tokens are far from zero, so that its answers are made of them."""
    save_larger("llama", lora_config("llama", 4, **BOTH), folder)
    weights = load_file(folder / "adapter_model.safetensors")
    for matrix in ("weight", "modules_to_save.weight"):
        weights[f"base_model.model.lm_head.{matrix}"][VOCAB_SIZE:] *= 40
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@asynccontextmanager
async def started(root: Path, **changes: Any) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(config_of(root, **changes))
    try:
        yield engine
    finally:
        await engine.close()


async def answer(
    engine: AsyncEngine, adapter: str, prompt: Sequence[int] = PROMPT, *, request_id: str = "", **asked: Any
) -> Delta:
    asked.setdefault("sampling", GREEDY)
    asked.setdefault("stopping", StoppingParams(max_tokens=NUM_TOKENS, ignore_eos=True))
    request = GenerationRequest(
        request_id=request_id or adapter or "base", adapter=adapter, prompt=Prompt(token_ids=tuple(prompt)), **asked
    )
    return merge_deltas([delta async for delta in await engine.submit(request)])


def peft_answer(folder: Path, prompt: Sequence[int]) -> list[int]:
    """Greedily."""
    model, tokens = peft_model("llama", folder), list(prompt)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
