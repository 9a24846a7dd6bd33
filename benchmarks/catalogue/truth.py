"""What a content answers when nothing else runs: an engine of its own in this process, and PEFT."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.catalogue.answers import MAX_TOKENS, prompt_of
from benchmarks.catalogue.content import Contents
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.request import GenerationRequest, Prompt, SamplingParams, StoppingParams

MAX_GAP = 1e-2  # of a logit, fp32: so much less likely than PEFT's best token one of ours may be


@dataclass(frozen=True, slots=True)
class Question:
    """What a name is asked, and for how many tokens at most."""

    prompt_of: Callable[[str, int], list[int]] = prompt_of  # of a name, for a vocabulary of that size
    max_tokens: int = MAX_TOKENS
    max_model_len: int = 64


QUESTION = Question()

Asked = tuple[int, str]  # a content, and the name whose prompt it is asked
Tokens = tuple[int, ...]


def expected_tokens(
    contents: Contents, folder: Path, asked: Iterable[Asked], question: Question = QUESTION
) -> dict[Asked, Tokens]:
    """One request at a time."""
    folder.mkdir()
    return asyncio.run(_expected_tokens(contents, folder, sorted(asked), question))


async def _expected_tokens(
    contents: Contents, folder: Path, asked: list[Asked], question: Question
) -> dict[Asked, Tokens]:
    config = EngineConfig(
        model=contents.base.path,
        adapters=in_directory(folder),
        watch="off",
        device="cpu",
        max_num_seqs=1,
        max_num_batched_tokens=32,
        max_model_len=question.max_model_len,
        kv_cache_bytes=16 << 20,
        adapter_pool_bytes=max(8 << 20, 16 * contents.mean_bytes()),
        host_cache_bytes=0,
        enable_prefix_cache=False,
    )
    engine = await AsyncEngine.start(config)
    try:
        return {one: await _alone(engine, contents, folder, one, question) for one in asked}
    finally:
        await engine.close()


async def _alone(engine: AsyncEngine, contents: Contents, folder: Path, asked: Asked, question: Question) -> Tokens:
    number, name = asked
    directory = folder / f"c{number}-{name}"
    contents.write(number, directory)
    stream = await engine.submit(
        GenerationRequest(
            request_id=directory.name,
            prompt=Prompt(token_ids=tuple(question.prompt_of(name, contents.base.vocab_size))),
            adapter=directory.name,
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_tokens=question.max_tokens, ignore_eos=True),
        )
    )
    tokens = [token async for delta in stream for token in delta.token_ids]
    engine.adapters.unload(directory.name)
    shutil.rmtree(directory)
    return tuple(tokens)


def unlike_peft(
    contents: Contents, folder: Path, expected: Mapping[Asked, Tokens], question: Question = QUESTION
) -> list[Asked]:
    """Those of which PEFT would not have chosen one of the tokens, nor nearly so."""
    base = AutoModelForCausalLM.from_pretrained(contents.base.path, dtype=torch.float32).eval()
    unlike = []
    for (number, name), tokens in expected.items():
        directory = folder / f"peft-{number}-{name}"
        contents.write(number, directory)
        adapted = PeftModel.from_pretrained(base, directory).eval()
        if _gap(adapted, question.prompt_of(name, contents.base.vocab_size), tokens) > MAX_GAP:
            unlike.append((number, name))
        adapted.unload()
        shutil.rmtree(directory)
    return unlike


@torch.inference_mode()
def _gap(model: PeftModel, prompt: Sequence[int], tokens: Tokens) -> float:
    """How much less likely than the best one a token is, at the worst place."""
    logits = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float((logits.max(dim=1).values - chosen).max())
