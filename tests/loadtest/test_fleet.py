"""The rival is served right: merged as PEFT merges, one forward pass at a time, and never with another's weights."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.peft_adapters import gralora_config, in_authors_dialect, lora_config, save_adapter
from support.tiny_models import tiny_model
from support.workspaces import save_workspace

from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.assemble import EngineParts
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.errors import AdapterNotFoundError
from gralora_runtime.model.adaptable import adaptable_modules
from gralora_runtime.model.merging import merge_adapter
from gralora_runtime.request import Delta, GenerationRequest, Prompt, SamplingParams, StoppingParams
from gralora_runtime.stream import merge_deltas
from gralora_server.loadtest.fleet import FleetEngine, Turn

ADAPTERS = {
    "g0": gralora_config("llama", 8, 2, alpha=32),
    "g1": gralora_config("llama", 16, 4, alpha=64),
    "hybrid": gralora_config("llama", 8, 2, hybrid_r=3, alpha=40),
    "lora": lora_config("llama", 5, alpha=20),
}
NAMES = tuple(ADAPTERS)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_workspace(tmp_path_factory.mktemp("fleet"), ADAPTERS)


@pytest.fixture
def config(workspace: Path) -> EngineConfig:
    return EngineConfig(
        model=workspace / "model",
        adapters=in_directory(workspace / "adapters"),
        device="cpu",
        max_num_seqs=8,
        max_num_batched_tokens=48,
        page_size=4,
        kv_cache_bytes=8 << 20,
        adapter_pool_bytes=8 << 20,
        num_threads=1,
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("kind", ["k1", "k2", "hybrid", "authors", "lora"])
def test_merged_weights_are_those_of_peft(architecture: str, kind: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    made = {
        "k1": lambda: gralora_config(architecture, 8, 1),
        "k2": lambda: gralora_config(architecture, 8, 2),
        "hybrid": lambda: gralora_config(architecture, 8, 4, hybrid_r=2),
        "authors": lambda: gralora_config(architecture, 8, 2, hybrid_r=2),
        "lora": lambda: lora_config(architecture, 4),
    }[kind]()
    folder = save_adapter(model, made, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(deepcopy(model), folder).merge_and_unload()
    if kind == "authors":
        in_authors_dialect(folder)
    ours = deepcopy(model)

    shapes = [shape for shape, _ in adaptable_modules(ours)]
    merge_adapter(ours, load("adapter", folder, shapes, torch.float32, max_width=256))

    merged, expected = ours.state_dict(), theirs.state_dict()
    changed = [name for name, weight in merged.items() if not torch.equal(weight, model.state_dict()[name])]
    assert changed
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5)


def request(request_id: str, adapter: str, max_tokens: int = 12) -> GenerationRequest:
    rng = random.Random(request_id)
    return GenerationRequest(
        request_id=request_id,
        prompt=Prompt(token_ids=tuple(rng.randrange(3, 300) for _ in range(rng.randrange(5, 30)))),
        adapter=adapter,
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_tokens=max_tokens, ignore_eos=True),
    )


async def tokens(engine: AsyncEngine | FleetEngine, one: GenerationRequest) -> tuple[int, ...]:
    stream = await engine.submit(one)
    deltas: list[Delta] = [delta async for delta in stream]
    return merge_deltas(deltas).token_ids


REQUESTS = [request(f"{name}-{i}", name) for i in range(5) for name in (*NAMES, "")]


async def answers_of(engine: AsyncEngine | FleetEngine) -> list[tuple[int, ...]]:
    try:
        return list(await asyncio.gather(*(tokens(engine, one) for one in REQUESTS)))
    finally:
        await engine.close()


@pytest.mark.parametrize("max_models", [1, 2, 4])
def test_every_customer_gets_what_the_multi_adapter_engine_gives(config: EngineConfig, max_models: int) -> None:
    """However often weights are swapped: 25 requests at once, by five names in turn."""

    async def ours() -> list[tuple[int, ...]]:
        return await answers_of(await AsyncEngine.start(config))

    async def fleet() -> list[tuple[int, ...]]:
        return await answers_of(await FleetEngine.start(config, max_models))

    expected = asyncio.run(ours())

    assert asyncio.run(fleet()) == expected
    assert len(set(expected)) > len(NAMES)  # adapters and prompts make a difference


def test_a_model_is_swapped_out_only_when_its_requests_are_done(config: EngineConfig) -> None:
    async def run() -> None:
        fleet = await FleetEngine.start(config, 1, preload=["g0"])
        running = await fleet.submit(request("long", "g0", 60))
        other = asyncio.create_task(tokens(fleet, request("other", "g1")))
        deltas = [delta async for delta in running]
        assert len(merge_deltas(deltas).token_ids) == 60
        assert len(await other) == 12
        assert list(fleet._models) == ["g1"]
        assert fleet.load().running == 0
        await fleet.close()

    asyncio.run(run())


def test_who_goes_away_leaves_the_model_to_the_next(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise one more model would be made than there is room for, and one of them would be lost."""
    made: list[str] = []
    merged = FleetEngine._merged

    def slowly(self: FleetEngine, name: str, source: Path) -> EngineParts:
        made.append(name)
        time.sleep(0.2)
        return merged(self, name, source)

    monkeypatch.setattr(FleetEngine, "_merged", slowly)

    async def run() -> None:
        fleet = await FleetEngine.start(config, 1, preload=["g0"])
        impatient = asyncio.create_task(tokens(fleet, request("impatient", "g1")))
        await asyncio.sleep(0.1)
        impatient.cancel()
        assert len(await tokens(fleet, request("patient", "g1"))) == 12
        assert impatient.cancelled()
        assert list(fleet._models) == ["g1"]
        assert made == ["g0", "g1"]
        await fleet.close()

    asyncio.run(run())


def test_an_unknown_adapter_is_refused_and_the_next_one_served(config: EngineConfig) -> None:
    async def run() -> None:
        fleet = await FleetEngine.start(config, 1, preload=["g1"])
        with pytest.raises(AdapterNotFoundError):
            await fleet.submit(request("x", "nobody"))
        assert list(fleet._models) == ["g1"]  # nobody had to go for it
        assert len(await tokens(fleet, request("y", "g0"))) == 12
        await fleet.close()

    asyncio.run(run())


def test_turns_are_taken_in_the_order_of_asking() -> None:
    turn, order, started = Turn(), [], threading.Event()

    def take(name: int) -> None:
        with turn:
            order.append(name)

    with turn:
        threads = []
        for name in range(8):
            thread = threading.Thread(target=take, args=(name,))
            thread.start()
            threads.append(thread)
            while len(turn._waiting) <= name:
                started.wait(0.001)
        assert order == []
    for thread in threads:
        thread.join()

    assert order == list(range(8))
    assert not turn._taken


def test_models_that_share_a_turn_never_step_together(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = 0, 0
    enter, leave = Turn.__enter__, Turn.__exit__

    def entering(self: Turn) -> None:
        nonlocal inside, most
        enter(self)
        inside += 1
        most = max(most, inside)

    def leaving(self: Turn, *error: object) -> None:
        nonlocal inside
        inside -= 1
        leave(self, *error)

    monkeypatch.setattr(Turn, "__enter__", entering)
    monkeypatch.setattr(Turn, "__exit__", leaving)

    async def run() -> None:
        await answers_of(await FleetEngine.start(config, 4))

    asyncio.run(run())

    assert most == 1
