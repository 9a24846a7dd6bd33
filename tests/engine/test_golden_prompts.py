"""Golden prompts on a real engine: written by `gralora adapters golden`'s code, answered beside other requests."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from engine.test_async_engine import finish, request, slow_down, until, with_engine
from support.peft_adapters import gralora_config
from support.tiny_models import VOCAB_SIZE
from support.workspaces import config_of, save_workspace

from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.checkpoint.golden import Golden, write_golden
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.errors import AdapterRejectedError, DrainingError
from gralora_runtime.golden_answers import answer
from gralora_runtime.request import Delta, Prompt

CONFIGS = {name: gralora_config("llama", 8, 2, alpha=32) for name in ("tenant", "other", "third")}
PROMPTS = (Prompt(token_ids=(5, 6, 7, 8, 9)), Prompt(token_ids=(40, 41, 42)))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_workspace(tmp_path_factory.mktemp("golden"), CONFIGS)


@pytest.fixture(scope="module")
def golden(originals: Path) -> Golden:
    """Of `tenant`."""
    found = answer(originals / "adapters" / "tenant", originals / "model", PROMPTS, max_tokens=8)
    assert found.num_distinct == len(PROMPTS), "the base model would pass as well"
    return found.golden


@pytest.fixture
def adapters(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "adapters", tmp_path / "adapters"))


@pytest.fixture
def config(originals: Path, adapters: Path) -> EngineConfig:
    return config_of(originals, adapters=in_directory(adapters), max_num_seqs=2, max_queue=2, watch="off")


def expect(adapter: Path, golden: Golden) -> None:
    write_golden(adapter, golden, vocab_size=VOCAB_SIZE)


def test_its_own_answers_admit_an_adapter_and_anothers_refuse_it(
    config: EngineConfig, adapters: Path, golden: Golden
) -> None:
    for name in ("tenant", "other"):
        expect(adapters / name, golden)

    async def work(engine: AsyncEngine) -> list[Delta]:
        served = [await finish(engine, request(f"1#{name}", name)) for name in ("tenant", "third")]
        with pytest.raises(AdapterRejectedError, match=r"golden.json: cases\[0\] answers .*\(made with the base model"):
            await engine.submit(request("2", "other"))
        assert engine.adapters.get("other").state == AdapterState.FAILED
        return served

    tried = with_engine(config, work)
    for name in ("tenant", "other"):
        (adapters / name / "golden.json").unlink()
    untried = with_engine(
        config,
        lambda engine: asyncio.gather(*(finish(engine, request(f"1#{name}", name)) for name in ("tenant", "third"))),
    )
    assert [delta.token_ids for delta in tried] == [delta.token_ids for delta in untried]


def test_trials_are_nobodys_requests_and_wait_in_no_full_queue(
    config: EngineConfig, adapters: Path, golden: Golden
) -> None:
    expect(adapters / "tenant", golden)

    async def work(engine: AsyncEngine) -> None:
        slow_down(engine, 0.002)
        busy = [asyncio.create_task(finish(engine, request(f"{at}", "third", max_tokens=40))) for at in range(3)]
        await until(lambda: engine.load().running == 2)
        tried = await finish(engine, request("asked", "tenant", max_tokens=4))
        assert len(tried.token_ids) == 4
        await asyncio.gather(*busy)
        counts = engine.snapshot().requests
        assert counts.received == 4
        assert {label: tally.prompt_tokens for label, tally in counts.adapters.items() if label == "tenant@1"} == {
            "tenant@1": len(request("asked", "tenant").prompt.token_ids or ())
        }

    with_engine(config, work)


def test_a_request_that_was_taken_on_is_answered_although_the_server_drains(
    config: EngineConfig, adapters: Path, golden: Golden
) -> None:
    expect(adapters / "tenant", golden)

    async def work(engine: AsyncEngine) -> Delta:
        slow_down(engine, 0.02)  # the trial's steps, too
        asked = asyncio.create_task(finish(engine, request("asked", "tenant", max_tokens=4)))
        await until(lambda: engine.load().waiting_for_adapter == 1)
        engine.begin_drain()
        return await asked

    assert len(with_engine(config, work).token_ids) == 4


def test_a_server_that_ends_in_the_middle_of_a_trial_ends(config: EngineConfig, adapters: Path, golden: Golden) -> None:
    expect(adapters / "tenant", golden)

    async def work(engine: AsyncEngine) -> asyncio.Task[Delta]:
        slow_down(engine, 0.1)
        asked = asyncio.create_task(finish(engine, request("asked", "tenant", max_tokens=4)))
        await until(lambda: engine.load().running == 1)
        return asked

    async def run() -> None:
        engine = await AsyncEngine.start(config)
        asked = await work(engine)
        await engine.close()
        with pytest.raises(DrainingError):
            await asked
        assert engine.load().adapter_leases == 0

    asyncio.run(run())


def test_new_content_that_answers_otherwise_is_not_served_and_streams_notice_nothing(
    config: EngineConfig, adapters: Path, originals: Path, golden: Golden
) -> None:
    """Somebody overwrites a customer's adapter with another's."""
    expect(adapters / "tenant", golden)

    async def work(engine: AsyncEngine) -> list[Delta]:
        first = await finish(engine, request("same#1", "tenant"))
        running = asyncio.create_task(finish(engine, replace(request("same#2", "tenant"), request_id="running")))
        for file in (originals / "adapters" / "other").iterdir():
            shutil.copy(file, adapters / "tenant" / file.name)
        with pytest.raises(AdapterRejectedError):
            await asyncio.wrap_future(engine.adapters.load("tenant"))
        return [first, await running, await finish(engine, request("same#3", "tenant"))]

    answers = with_engine(config, work)
    assert len({delta.token_ids for delta in answers}) == 1
    assert {delta.started.adapter_version for delta in answers if delta.started} == {1}
