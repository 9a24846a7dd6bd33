"""Golden answers of one adapter, from an engine that is started for them alone."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gralora_runtime.adapters.checkpoint.golden import Golden, GoldenCase
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE, inspect
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.model.module_shapes import module_shapes
from gralora_runtime.request import GenerationRequest, Prompt, ResponseParams, SamplingParams, StoppingParams
from gralora_runtime.stream import merge_deltas

NAME = "golden"  # of the only adapter, whatever its directory is called


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenAnswers:
    """What was answered, and how much of it proves anything."""

    golden: Golden
    num_distinct: int  # cases that the base model answers otherwise: the others would not tell if it served instead
    vocab_size: int


def answer(adapter: Path, model: Path, prompts: Sequence[Prompt], *, max_tokens: int) -> GoldenAnswers:
    """What the adapter answers greedily, in at most so many tokens. Raises a `GraloraError` if it cannot be served."""
    header = inspect(adapter)
    modules = module_shapes(model)
    header.fitting_plan(modules)
    # The engine serves what lies below one directory, and looks into all of it: so this adapter gets one of its own.
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / NAME
        copy.mkdir()
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(adapter / file, copy / file)
        config = EngineConfig(
            model=model,
            adapters=in_directory(Path(folder)),
            watch="off",
            adapter_pool_bytes=header.cpu_pool_bytes(modules),
            max_adapter_rank=header.equivalent_rank,
        )
        found = asyncio.run(_answer(config, prompts, max_tokens))
        return replace(found, vocab_size=found.vocab_size + header.summary(modules).added_tokens)


async def _answer(config: EngineConfig, prompts: Sequence[Prompt], max_tokens: int) -> GoldenAnswers:
    engine = await AsyncEngine.start(config)
    try:
        asked = [(name, prompt) for name in (NAME, "") for prompt in prompts]
        work = [_case(engine, str(at), name, prompt, max_tokens) for at, (name, prompt) in enumerate(asked)]
        cases = await asyncio.gather(*work)
    finally:
        await engine.close()
    of_adapter, of_base = cases[: len(prompts)], cases[len(prompts) :]
    return GoldenAnswers(
        golden=Golden(model=engine.info().model, cases=tuple(of_adapter)),
        num_distinct=sum(mine != base for mine, base in zip(of_adapter, of_base, strict=True)),
        vocab_size=engine.info().vocab_size,
    )


async def _case(engine: AsyncEngine, request_id: str, adapter: str, prompt: Prompt, max_tokens: int) -> GoldenCase:
    request = GenerationRequest(
        request_id=request_id,
        prompt=prompt,
        adapter=adapter,
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_tokens=max_tokens),
        response=ResponseParams(echo_prompt_token_ids=True),
    )
    whole = merge_deltas([delta async for delta in await engine.submit(request)])
    assert whole.started is not None
    return GoldenCase(prompt_token_ids=whole.started.prompt_token_ids, expected_token_ids=whole.token_ids)
