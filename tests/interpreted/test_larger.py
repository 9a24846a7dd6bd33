"""Adapters with more tokens than the base model, through Triton's kernels: PEFT's logits, and sampled on the device."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from support.larger import (
    BOTH,
    FROM_NEW,
    NEW,
    answer,
    larger_configs,
    peft_answer,
    peft_logits,
    peft_model,
    save_larger,
    save_loud,
    started,
)
from support.peft_adapters import gralora_config, lora_config
from support.served import MAX_DIFFERENCE, PROMPT, serving
from support.tiny_models import VOCAB_SIZE
from support.workspaces import save_workspace

from gralora_runtime.request import ResponseParams, SamplingParams, StoppingParams, StructuredOutput

TRITON = {"kernel_backend": "triton", "batch_invariant": True, "cuda_graphs": (), "max_num_seqs": 4}
WITH_NEW = [*PROMPT[:5], NEW[1], NEW[2]]


@pytest.mark.parametrize("architecture", ["qwen3", "opt"])
def test_pefts_logits_by_the_program_and_by_transformers(architecture: str, tmp_path: Path) -> None:
    configs = larger_configs(architecture, tied=False)
    kept = ("larger-saved", "larger-lora", "larger-tokens")
    for name in kept:
        save_larger(architecture, configs[name], tmp_path / "adapters" / name)
    plain = {"plain": lora_config(architecture, 5)}
    with serving(
        architecture, tmp_path / "model", tmp_path / "adapters", configs=plain, kernel_backend="triton", cuda_graphs=()
    ) as served:
        adapters = served.parts.adapters
        leases = {name: adapters.acquire(name).result(60) for name in ("", "plain", *kept)}
        rows = [(lease, WITH_NEW if name in kept else PROMPT[:6]) for name, lease in leases.items()]
        for chunk in (16, 4):
            found = dict(zip(leases, served.logits(rows, chunk), strict=True))
            for name in kept:
                model = peft_model(architecture, served.adapters_dir / name)
                assert (found[name] - peft_logits(model, WITH_NEW)).abs().max() <= MAX_DIFFERENCE, name
            for name in ("", "plain"):
                assert (found[name][VOCAB_SIZE:] == -torch.inf).all()
        for lease in leases.values():
            adapters.release(lease)


@pytest.mark.parametrize("pipeline", ["off", "on"])
async def test_they_are_chosen_on_the_device_beside_others_whose_answers_stay(pipeline: str, tmp_path: Path) -> None:
    root = save_workspace(tmp_path, {"plain": gralora_config("llama", 4, 2)})
    save_loud(root / "adapters" / "loud")
    save_larger("llama", lora_config("llama", 4, **BOTH), root / "adapters" / "quiet", added=2)
    rules: dict[str, dict[str, Any]] = {
        "loud": {},
        "plain": {"sampling": SamplingParams(temperature=1.0, seed=3, top_k=200, repetition_penalty=1.1)},
        "quiet": {
            "sampling": SamplingParams(temperature=1.0, seed=4, min_p=0.01, presence_penalty=0.2),
            "response": ResponseParams(logprobs=True, top_logprobs=3),
        },
        "": {
            "structured_output": StructuredOutput(regex="[xyz]{40}"),
            "stopping": StoppingParams(max_tokens=4),
        },
    }

    async with started(root, pipeline=pipeline, **TRITON) as engine:
        alone = {name: await answer(engine, name, **rules[name]) for name in rules if name != "loud"}
        prompts = {"loud": FROM_NEW}
        together = await asyncio.gather(
            *(answer(engine, name, prompts.get(name, PROMPT), **asked) for name, asked in rules.items())
        )
    async with started(root, **(TRITON | {"kernel_backend": "reference"})) as engine:
        on_host = {name: await answer(engine, name, prompts.get(name, PROMPT), **rules[name]) for name in rules}

    found = dict(zip(rules, together, strict=True))
    assert list(found["loud"].token_ids) == peft_answer(root / "adapters" / "loud", FROM_NEW)
    assert set(found["loud"].token_ids) & set(NEW)
    for name, delta in alone.items():
        assert found[name].token_ids == delta.token_ids, name
        # The interpreter's products are numpy's, whose sums depend on the number of rows.
        for one, other in zip(found[name].logprobs, delta.logprobs, strict=True):
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    for name, delta in on_host.items():
        assert found[name].token_ids == delta.token_ids, name


async def test_an_answer_of_theirs_that_matches_something_is_made_of_the_base_models_tokens(tmp_path: Path) -> None:
    root = save_workspace(tmp_path, {})
    save_loud(root / "adapters" / "loud")
    async with started(root, **TRITON) as engine:
        found = await answer(
            engine,
            "loud",
            FROM_NEW,
            stopping=StoppingParams(max_tokens=4),
            structured_output=StructuredOutput(regex="(yes|no){2}"),
        )

    assert max(found.token_ids) < VOCAB_SIZE
