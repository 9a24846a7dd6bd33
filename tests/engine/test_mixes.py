"""Sums of adapters on a real engine: the right logits and tokens, in one batch, and prefixes that are nobody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.test_async_engine import request, with_engine
from peft import PeftModel
from support.device import DEVICE
from support.peft_adapters import gralora_config, lora_config
from support.served import CONFIG, MAX_DIFFERENCE, PROMPT, Served
from support.tiny_models import tiny_model
from support.workspaces import save_workspace
from transformers import PreTrainedModel

from gralora_runtime.assemble import assemble
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.request import Delta, GenerationRequest, Prompt, WeightedAdapter
from gralora_runtime.stream import merge_deltas

NUM_TOKENS = 16
CONFIGS = {
    "lora": lora_config("llama", 5, alpha=20),
    "other": lora_config("llama", 8, alpha=24),
    "hybrid": gralora_config("llama", 8, 2, hybrid_r=3, alpha=40),
    "four": gralora_config("llama", 8, 4, alpha=32),
    "eight": gralora_config("llama", 16, 8, alpha=32),
    "some": gralora_config("llama", 4, 4, alpha=16, target_modules=["q_proj", "down_proj"]),
    "ends": lora_config("llama", 3, alpha=9, target_modules=["embed_tokens", "lm_head", "q_proj"]),
}
Mix = Mapping[str, float]
MIXES: tuple[Mix, ...] = (
    {"lora": 0.75, "other": 0.5},
    {"other": -1.0},
    {"hybrid": 0.5, "four": -0.75, "eight": 0.5},
    {"four": 0.5, "some": 0.25, "lora": 1.0, "other": -0.5},
    {"ends": 0.5, "hybrid": -0.5},
)
ALONE: tuple[Mix, ...] = ({}, {"lora": 1.0}, {"hybrid": 1.0}, {"four": 1.0})


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    root = save_workspace(tmp_path_factory.mktemp("mixes"), CONFIGS)
    return replace(CONFIG, model=root / "model", adapters=in_directory(root / "adapters"), device=DEVICE, watch="off")


def adapters_of(config: EngineConfig) -> Path:
    return config.model.parent / "adapters"


def update(config: EngineConfig, name: str) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight when it merges this adapter."""
    base = tiny_model("llama").state_dict()
    merged = PeftModel.from_pretrained(tiny_model("llama"), adapters_of(config) / name).merge_and_unload()
    return {key: weight - base[key] for key, weight in merged.state_dict().items()}


@pytest.fixture(scope="module")
def merged(config: EngineConfig) -> dict[str, PreTrainedModel]:
    """The base model with each mix added to its weights by hand, in float32, by its name."""
    updates = {name: update(config, name) for name in CONFIGS}
    models = {}
    for mix in (*ALONE, *MIXES):
        model = tiny_model("llama").eval()
        weights = model.state_dict()
        for name, weight in mix.items():
            weights = {key: value + weight * updates[name][key] for key, value in weights.items()}
        model.load_state_dict(weights)
        models[str(mix)] = model
    return models


def weighted(mix: Mix) -> tuple[WeightedAdapter, ...]:
    return tuple(WeightedAdapter(name, weight) for name, weight in mix.items())


def logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1]


def greedy(model: PreTrainedModel, tokens: list[int]) -> list[int]:
    answer: list[int] = []
    for _ in range(NUM_TOKENS):
        answer.append(int(logits(model, tokens + answer).argmax()))
    return answer


def test_pefts_own_sum_is_the_one_by_hand(config: EngineConfig, merged: dict[str, PreTrainedModel]) -> None:
    """PEFT adds up LoRAs alone; for them the oracle of all others agrees with it."""
    mix = MIXES[0]
    model = PeftModel.from_pretrained(tiny_model("llama"), adapters_of(config) / "lora", adapter_name="lora")
    model.load_adapter(adapters_of(config) / "other", adapter_name="other")
    model.add_weighted_adapter(list(mix), list(mix.values()), "sum", combination_type="cat")
    model.set_adapter("sum")

    torch.testing.assert_close(logits(model.eval(), PROMPT), logits(merged[str(mix)], PROMPT), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("backend", "chunk"), [("auto", 7), ("reference", len(PROMPT))])
def test_logits_are_those_of_merged_weights_in_one_batch_with_everybody(
    config: EngineConfig, merged: dict[str, PreTrainedModel], backend: str, chunk: int
) -> None:
    """The reference's matrices lie as a GPU's do."""
    parts = assemble(replace(config, kernel_backend=backend))
    served = Served(parts, config.model, adapters_of(config), "llama")
    asked = [
        *[parts.adapters.acquire("".join(mix)) for mix in ALONE],
        *[parts.adapters.acquire_mix(weighted(mix)) for mix in MIXES],
    ]
    leases = [future.result(30) for future in asked]
    prompts = [PROMPT[: len(PROMPT) - index % 5] for index in range(len(leases))]
    ours = served.logits(list(zip(leases, prompts, strict=True)), chunk)
    for lease in leases:
        parts.adapters.release(lease)
    parts.adapters.check_integrity()
    parts.adapters.close()

    for mix, prompt, found in zip((*ALONE, *MIXES), prompts, ours, strict=True):
        expected = logits(merged[str(mix)], prompt)
        assert (found - expected).abs().max() <= MAX_DIFFERENCE, mix
        others = [logits(model, prompt) for name, model in merged.items() if name != str(mix)]
        assert min((expected - other).abs().max() for other in others) > 0.05, f"{mix} is like another one"


async def whole(engine: AsyncEngine, asked: GenerationRequest) -> Delta:
    return merge_deltas([delta async for delta in await engine.submit(asked)])


def of_mix(request_id: str, mix: Mix) -> GenerationRequest:
    return replace(
        request(request_id, max_tokens=NUM_TOKENS), prompt=Prompt(token_ids=tuple(PROMPT)), adapters=weighted(mix)
    )


def test_tokens_are_those_of_merged_weights_and_prefixes_are_shared_with_nobody(
    config: EngineConfig, merged: dict[str, PreTrainedModel]
) -> None:
    """All at once, and then again one after the other: each finds its own prefix, and is told what served it."""

    async def work(engine: AsyncEngine) -> None:
        mixes = (*ALONE, *MIXES)
        answers = await asyncio.gather(*[whole(engine, of_mix(f"first{at}", mix)) for at, mix in enumerate(mixes)])
        for at, (mix, answer) in enumerate(zip(mixes, answers, strict=True)):
            assert list(answer.token_ids) == greedy(merged[str(mix)], PROMPT), mix
            assert answer.started is not None
            assert answer.started.cached_tokens == 0, mix
            again = await whole(engine, of_mix(f"again{at}", mix))
            assert again.started is not None
            assert again.started.cached_tokens > 0
            assert again.token_ids == answer.token_ids
        near = await whole(engine, of_mix("near", {"lora": 0.75, "other": 0.5000001}))
        assert near.started is not None
        assert near.started.cached_tokens == 0
        assert len({answer.started.adapter_digest for answer in (*answers, near) if answer.started}) == len(mixes) + 1

        served = answers[len(ALONE) + 2].started
        assert served is not None
        assert (served.adapter, served.adapter_version) == ("eight*0.5+four*-0.75+hybrid*0.5", 0)
        alone = answers[ALONE.index({"four": 1.0})].started
        assert alone is not None
        assert {(one.name, one.weight) for one in served.adapters} == set(MIXES[2].items())
        assert [one.digest for one in served.adapters if one.name == "four"] == [alone.adapter_digest]
        counted = engine.requests.read().adapters
        assert counted["eight@1+four@1+hybrid@1"].requests == 2
        assert counted["lora@1+other@1"].requests == 3, "whatever the weights"

    with_engine(replace(config, max_num_seqs=32, max_num_batched_tokens=48), work)
