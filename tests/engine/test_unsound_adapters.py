"""An adapter that gives no numbers, time after time, does not eat steps for ever; a bad prompt harms nobody else."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import torch
from support.fakes import Clock
from support.peft_adapters import lora_config
from support.workspaces import save_workspace

from gralora_runtime.adapters.catalogue.numerics import IN_A_ROW, Numerics
from gralora_runtime.adapters.catalogue.quarantine import LONGEST_S, Quarantine
from gralora_runtime.assemble import assemble
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.errors import AdapterQuarantinedError, NumericalError
from gralora_runtime.request import GenerationRequest, Prompt, SamplingParams, StoppingParams
from gralora_runtime.stepping.batch import StepTensors

OVERFLOWS = 299  # a prompt that begins with this token


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    root = save_workspace(tmp_path_factory.mktemp("unsound"), {name: lora_config("llama", 4) for name in ("a", "b")})
    made = EngineConfig(
        model=root / "model",
        adapters=in_directory(root / "adapters"),
        device="cpu",
        num_threads=1,
        enable_prefix_cache=False,
        kv_cache_bytes=4 << 20,
        adapter_pool_bytes=4 << 20,
    )
    assemble(made).adapters.close()  # after a change of kernels it compiles them, for longer than a test may take
    return made


@contextlib.asynccontextmanager
async def overflowing(config: EngineConfig) -> AsyncIterator[AsyncEngine]:
    """An engine in which some prompts overflow, whatever the adapter."""
    engine = await AsyncEngine.start(config)
    runner = engine._parts.runner
    execute = runner.execute

    def execute_badly(tensors: StepTensors) -> torch.Tensor:
        logits = execute(tensors)
        return logits * float("nan") if OVERFLOWS in tensors.input_ids else logits

    runner.execute = execute_badly  # type: ignore[method-assign]
    try:
        yield engine
        assert await engine.wait_idle(30)
        assert engine.load().adapter_leases == 0
    finally:
        await engine.close()


async def ask(engine: AsyncEngine, adapter: str, *, good: bool) -> None:
    """One token of an answer."""
    request = GenerationRequest(
        request_id=f"r{engine.requests.read().received}",
        prompt=Prompt(token_ids=(5 if good else OVERFLOWS, 6, 7)),
        adapter=adapter,
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_tokens=1),
    )
    async for _ in await engine.submit(request):
        pass


async def fail(engine: AsyncEngine, adapter: str, times: int) -> None:
    for _ in range(times):
        with pytest.raises(NumericalError):
            await ask(engine, adapter, good=False)


async def test_a_version_that_fails_time_and_again_gets_no_requests_for_a_while_and_no_steps(
    config: EngineConfig,
) -> None:
    async with overflowing(config) as engine:
        await fail(engine, "a", IN_A_ROW)
        steps = engine.load().steps
        with pytest.raises(AdapterQuarantinedError, match=r"'a@1' failed alike: .*; it is tried again in") as caught:
            await ask(engine, "a", good=True)
        assert engine.load().steps == steps
        await ask(engine, "b", good=True)

        assert 0 < caught.value.retry_after_s <= 1
        engine.adapters._store.get("a").current.numerics.quarantine.until_s = 0.0
        await ask(engine, "a", good=True)
        await fail(engine, "a", IN_A_ROW - 1)
        await ask(engine, "a", good=True)


async def test_prompts_that_overflow_among_others_keep_nobody_out(config: EngineConfig) -> None:
    async with overflowing(config) as engine:
        for _ in range(3):
            await fail(engine, "b", IN_A_ROW - 1)
            await ask(engine, "b", good=True)


async def test_the_base_model_is_never_kept_out(config: EngineConfig) -> None:
    async with overflowing(config) as engine:
        await fail(engine, "", 2 * IN_A_ROW)
        await ask(engine, "", good=True)


def test_each_quarantine_is_longer_than_the_one_before_until_five_minutes() -> None:
    clock = Clock()
    numerics, lengths = Numerics(quarantine=Quarantine(now_s=clock)), []
    for _ in range(12):
        while not numerics.fail("NaN"):
            assert numerics.error("a@1") is None
        lengths.append(numerics.quarantine.left_s)
        clock.now_s += lengths[-1]

    assert lengths[:4] == [1, 2, 4, 8]
    assert lengths[-1] == LONGEST_S
