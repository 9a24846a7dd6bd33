"""An engine in this process, and requests to it. Greedy, without an end of sequence, so that all have their lengths."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from benchmarks.catalogue.base import Base
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig
from gralora_runtime.request import GenerationRequest, Prompt, SamplingParams, StoppingParams

_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request, of the base model."""

    tenant: str
    prompt: int  # tokens
    output: int


@asynccontextmanager
async def engine_of(base: Base, rows: int) -> AsyncIterator[AsyncEngine]:
    """Its first steps are over, so that what comes next is compiled and has been measured."""
    config = EngineConfig(
        model=base.path, device="cpu", max_num_seqs=rows, kv_cache_bytes=512 << 20, enable_prefix_cache=False
    )
    engine = await AsyncEngine.start(config)
    try:
        for _ in range(3):
            await ask(engine, base, Asked(tenant="warm-up", prompt=64, output=8))
        yield engine
    finally:
        await engine.close()


async def ask(engine: AsyncEngine, base: Base, asked: Asked) -> float:
    """To the last token; seconds to the first."""
    number = next(_numbers)
    drawn = random.Random(number)
    request = GenerationRequest(
        request_id=f"r{number}",
        prompt=Prompt(token_ids=tuple(drawn.randrange(3, base.vocab_size) for _ in range(asked.prompt))),
        tenant=asked.tenant,
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_tokens=asked.output, ignore_eos=True),
    )
    begin_s = time.perf_counter()
    stream = await engine.submit(request)
    await anext(stream)
    first_s = time.perf_counter() - begin_s
    async for _ in stream:
        pass
    return first_s
