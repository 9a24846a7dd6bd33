"""What is told of a request: its parts leave no gap, and the sentence names what was done to it. Each cause is brought
about on a real engine, by what brings it about in life; only the machine's own speed is made up."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine.test_async_engine import finish, request, slow_down, until, with_engine
from support.device import DEVICE
from support.peft_adapters import gralora_config
from support.tiny_models import VOCAB_SIZE
from support.workspaces import save_workspace
from torch import Tensor

from gralora_runtime.adapters.checkpoint.golden import write_golden
from gralora_runtime.adapters.residency import mover
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.golden_answers import answer
from gralora_runtime.observation.timeline import Stage
from gralora_runtime.observation.verdict import Cause, Verdict, verdict
from gralora_runtime.observation.waterfall import Waterfall, waterfall
from gralora_runtime.request import GenerationRequest, Prompt, StructuredOutput
from gralora_runtime.stepping.batch import StepTensors
from gralora_runtime.structured import compiler

CONFIGS = {name: gralora_config("llama", 8, 2, alpha=32) for name in ("g0", "g1")}
LONG = tuple(3 + at % 290 for at in range(400))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_workspace(tmp_path_factory.mktemp("explained"), CONFIGS)


@pytest.fixture
def adapters(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "adapters", tmp_path / "adapters"))


@pytest.fixture
def config(originals: Path, adapters: Path) -> EngineConfig:
    return EngineConfig(
        model=originals / "model",
        adapters=in_directory(adapters),
        device=DEVICE,
        max_num_seqs=4,
        max_num_batched_tokens=48,
        page_size=4,
        kv_cache_bytes=8 << 20,
        adapter_pool_bytes=8 << 20,
        num_threads=1,
        watch="off",
    )


def told(engine: AsyncEngine, request_id: str) -> tuple[Waterfall, Verdict]:
    timeline = engine.timelines.find(request_id)
    assert timeline is not None
    found = waterfall(timeline)
    check_parts(found)
    return found, verdict(found)


def check_parts(found: Waterfall) -> None:
    """One after another from the beginning to the end."""
    at_s = 0.0
    for part in found.parts:
        assert part.start_s == pytest.approx(at_s)
        assert part.duration_s >= 0
        at_s += part.duration_s
    assert found.total_s == pytest.approx(at_s)


def cause_of(
    config: EngineConfig, request_id: str, work: Callable[[AsyncEngine], Awaitable[Any]]
) -> tuple[Waterfall, Verdict]:
    async def run(engine: AsyncEngine) -> tuple[Waterfall, Verdict]:
        await work(engine)
        return told(engine, request_id)

    return with_engine(config, run)


def slow_by_tokens(engine: AsyncEngine, token_s: float) -> None:
    """As a large model's: a step takes as long as it has tokens."""
    runner = engine._parts.runner
    execute = runner.execute

    def slow_execute(tensors: StepTensors) -> Tensor:
        time.sleep(token_s * tensors.input_ids.shape[-1])
        return execute(tensors)

    runner.execute = slow_execute  # type: ignore[method-assign]


def slow_loads(monkeypatch: pytest.MonkeyPatch, load_s: float) -> None:
    load = mover.load

    def slow_load(*args: Any, **options: Any) -> Any:
        time.sleep(load_s)
        return load(*args, **options)

    monkeypatch.setattr(mover, "load", slow_load)


async def busy(engine: AsyncEngine, wanted: GenerationRequest) -> asyncio.Task[Any]:
    """It decodes."""
    task = asyncio.create_task(finish(engine, wanted))
    timeline = None

    def decodes() -> bool:
        nonlocal timeline
        timeline = engine.timelines.find(wanted.request_id)
        return timeline is not None and any(mark.stage is Stage.DECODE for mark in timeline.marks)

    await until(decodes)
    return task


def test_a_request_that_nothing_is_done_to_spends_its_time_on_its_own_answer(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> None:
        await finish(engine, request("warm", "g0", max_tokens=2))
        slow_down(engine, 0.002)
        await finish(engine, request("r", "g0", max_tokens=40))

    found, why = cause_of(config, "r", work)
    assert why.cause is Cause.ANSWER
    assert "its own answer (40 tokens" in why.says
    assert found.adapter == "g0@1"
    assert found.outcome == "length"
    decoded = next(part for part in found.parts if part.stage is Stage.DECODE)
    assert decoded.steps.steps == 39
    assert decoded.longest is not None
    assert decoded.longest.prompt_tokens == 0


def test_a_prompt_in_chunks_is_told_chunk_by_chunk(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> None:
        slow_down(engine, 0.01)
        await finish(engine, replace(request("r", max_tokens=2), prompt=Prompt(token_ids=LONG)))

    found, why = cause_of(config, "r", work)
    assert why.cause is Cause.PROMPT, found
    prefill = next(part for part in found.parts if part.stage is Stage.PREFILL)
    assert sum(chunk.tokens for chunk in prefill.chunks) == len(LONG)
    assert max(chunk.tokens for chunk in prefill.chunks) == 48


def test_slow_disk(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_loads(monkeypatch, 0.4)
    _, why = cause_of(config, "r", lambda engine: finish(engine, request("r", "g0", max_tokens=4)))
    assert why.cause is Cause.SLOW_DISK
    assert "reading adapter g0@1 at" in why.says
    assert "from a slow disk" in why.says
    assert "--host-cache-bytes" in why.advice


def test_cold_adapter(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_loads(monkeypatch, 0.1)
    _, why = cause_of(config, "r", lambda engine: finish(engine, request("r", "g0", max_tokens=2)))
    assert why.cause is Cause.COLD_ADAPTER
    assert "as it was cold" in why.says


def test_full_pool(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> None:
        slow_down(engine, 0.01)
        holder = await busy(engine, request("holder", "g0", max_tokens=30))
        await finish(engine, request("r", "g1", max_tokens=4))
        await holder

    _, why = cause_of(replace(config, max_adapter_slots=1), "r", work)
    assert why.cause is Cause.FULL_POOL
    assert "g1" in why.says
    assert "--adapter-pool-bytes" in why.advice


def test_golden_trial(config: EngineConfig, originals: Path, adapters: Path) -> None:
    prompts = (Prompt(token_ids=(5, 6, 7, 8, 9)), Prompt(token_ids=(40, 41, 42)))
    golden = answer(originals / "adapters" / "g0", originals / "model", prompts, max_tokens=8).golden
    write_golden(adapters / "g0", golden, vocab_size=VOCAB_SIZE)

    async def work(engine: AsyncEngine) -> None:
        slow_down(engine, 0.01)
        await finish(engine, request("r", "g0", max_tokens=2))

    _, why = cause_of(config, "r", work)
    assert why.cause is Cause.ADAPTER_TRIAL
    assert "golden prompts" in why.says


def test_grammar(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = compiler._compile

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        return compile_(*args)

    monkeypatch.setattr(compiler, "_compile", slow)
    wanted = replace(request("r", max_tokens=2), structured_output=StructuredOutput(regex="[a-z]{1,20}"))
    _, why = cause_of(config, "r", lambda engine: finish(engine, wanted))
    assert why.cause is Cause.GRAMMAR


def test_places(config: EngineConfig) -> None:
    """Of its own tenant's, that is: nobody else is there."""

    async def work(engine: AsyncEngine) -> None:
        slow_down(engine, 0.01)
        first = await busy(engine, replace(request("first", max_tokens=30), tenant="acme"))
        await finish(engine, replace(request("r", max_tokens=2), tenant="acme"))
        await first

    _, why = cause_of(replace(config, max_num_seqs=1), "r", work)
    assert why.cause is Cause.PLACES
    assert "--max-num-seqs" in why.advice


def test_flood(config: EngineConfig) -> None:
    """One whose weight is so small that it takes nobody's place: the flood was there first."""

    async def work(engine: AsyncEngine) -> None:
        slow_down(engine, 0.01)
        flood = [replace(request(f"flood{at}", max_tokens=10), tenant="flood") for at in range(8)]
        running = [asyncio.create_task(finish(engine, one)) for one in flood]
        await until(lambda: engine.load().running == 2)
        await finish(engine, replace(request("r", max_tokens=2), tenant="small", weight=0.01))
        await asyncio.gather(*running)

    found, why = cause_of(replace(config, max_num_seqs=2), "r", work)
    assert why.cause is Cause.FLOOD
    assert "requests of flood" in why.says
    queued = next(part for part in found.parts if part.stage is Stage.QUEUE)
    assert queued.own_ahead == 0
    assert queued.given_way is not None
    assert queued.given_way.to == "flood"
    hidden = verdict(found, lambda _: "another tenant")
    assert "flood" not in hidden.says


def test_long_neighbour_prompt(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> None:
        slow_by_tokens(engine, 0.002)
        watched = await busy(engine, request("r", max_tokens=60))
        await finish(engine, replace(request("long", max_tokens=1), prompt=Prompt(token_ids=LONG)))
        await watched

    found, why = cause_of(replace(config, max_num_batched_tokens=448), "r", work)
    assert why.cause is Cause.NEIGHBOUR_PROMPT
    decoded = next(part for part in found.parts if part.stage is Stage.DECODE)
    assert decoded.longest is not None
    assert decoded.longest.prompt_of == "long"
    assert decoded.longest.prompt_tokens == len(LONG)
    assert "400 tokens of long" in why.says


def test_slow_reader(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> None:
        stream = await engine.submit(request("r", max_tokens=40))
        slow_down(engine, 0.001)
        await anext(stream)
        stream.hold()
        await until(lambda: engine.load().paused == 1)
        await asyncio.sleep(0.4)
        stream.go_on()
        async for _ in stream:
            pass

    found, why = cause_of(config, "r", work)
    assert why.cause is Cause.SLOW_READER
    assert found.time_of(Stage.PAUSED) > 0.3


def test_preemption_for_pages(config: EngineConfig) -> None:
    """Of two answers that grow beyond what there is the younger's pages are the older's."""

    async def work(engine: AsyncEngine) -> None:
        slow_down(engine, 0.005)
        older = await busy(
            engine, replace(request("older", max_tokens=100), tenant="a", prompt=Prompt(token_ids=(5, 6)))
        )
        await finish(engine, replace(request("r", max_tokens=28), tenant="a", prompt=Prompt(token_ids=LONG[:80])))
        await older

    small = replace(config, kv_cache_bytes=60 << 10, max_model_len=110)
    found, why = cause_of(small, "r", work)
    assert found.preemptions > 0, "nobody gave way: this test would not notice"
    assert why.cause is Cause.PREEMPTION
    assert "pages of the KV cache" in why.says


def test_a_ring_that_is_full_forgets_the_oldest_and_one_of_none_all(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> list[str]:
        for at in range(4):
            await finish(engine, request(f"r{at}", max_tokens=1))
        return [timeline.request_id for timeline in engine.timelines.recent()]

    assert with_engine(replace(config, max_explained_requests=2), work) == ["r2", "r3"]
    assert with_engine(replace(config, max_explained_requests=0), work) == []
