"""Silent wrong answers and dead engines that users of other servers reported, tried on this one.

Each test is named after the report. What is compared is what each adapter answers alone.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from engine.test_async_engine import finish, request, slow_down, until, with_engine
from support.checkpoints import edit_config, edit_tensors
from support.peft_adapters import gralora_config, lora_config
from support.workspaces import config_of, save_workspace
from torch import Tensor

from gralora_runtime.adapters.checkpoint import loader
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.errors import AdapterRejectedError
from gralora_runtime.request import Delta, GenerationRequest

CONFIGS = {
    "tenant": gralora_config("llama", 8, 2, alpha=32),
    "other": gralora_config("llama", 8, 2, alpha=32),
    "third": gralora_config("llama", 16, 4, alpha=64),
    "lora": lora_config("llama", 5, alpha=20),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_workspace(tmp_path_factory.mktemp("field"), CONFIGS)


@pytest.fixture
def adapters(originals: Path, tmp_path: Path) -> Path:
    """A directory of its own, so that a test may change what lies there."""
    return Path(shutil.copytree(originals / "adapters", tmp_path / "adapters"))


@pytest.fixture
def config(originals: Path, adapters: Path) -> EngineConfig:
    return config_of(originals, adapters=in_directory(adapters), max_num_seqs=16, watch="off")


def asked(name: str, request_id: str, *, max_tokens: int = 16) -> GenerationRequest:
    """The same prompt whoever answers, long enough to fill pages of the prefix cache."""
    return replace(request("same#", "", max_tokens=max_tokens), request_id=request_id, adapter=name)


def swap(adapters: Path, name: str, content: str, originals: Path) -> None:
    shutil.rmtree(adapters / name, ignore_errors=True)
    shutil.copytree(originals / "adapters" / content, adapters / name)


def alone(config: EngineConfig, *names: str) -> dict[str, tuple[int, ...]]:
    """What each answers when nothing else runs."""

    async def work(engine: AsyncEngine) -> dict[str, tuple[int, ...]]:
        return {name: (await finish(engine, asked(name, f"alone-{name}"))).token_ids for name in names}

    answers = with_engine(config, work)
    assert len(set(answers.values())) == len(names), "the test could not tell them apart"
    return answers


async def beside(engine: AsyncEngine, name: str, happens: Callable[[], Awaitable[object]]) -> Delta:
    """A long stream of one adapter, in whose middle something happens."""
    slow_down(engine, 0.005)
    running = asyncio.create_task(finish(engine, asked(name, f"running-{name}", max_tokens=60)))
    await until(lambda: engine.load().running == 1)
    await happens()
    assert not running.done()
    return await running


def test_vllm_47724_a_running_request_keeps_its_adapter_when_another_is_added(
    config: EngineConfig, adapters: Path, originals: Path
) -> None:
    """There a request in flight was silently answered with another tenant's adapter."""
    expected = alone(config, "tenant", "other")
    shutil.rmtree(adapters / "other")

    async def work(engine: AsyncEngine) -> tuple[Delta, Delta]:
        added: list[Delta] = []

        async def add() -> None:
            swap(adapters, "other", "other", originals)
            added.append(await finish(engine, asked("other", "added")))

        return await beside(engine, "tenant", add), added[0]

    kept, added = with_engine(config, work)
    assert kept.token_ids[:16] == expected["tenant"]
    assert added.token_ids == expected["other"]


def test_vllm_30931_42125_a_prefix_of_the_old_content_is_not_reused_under_the_same_name(
    config: EngineConfig, adapters: Path, originals: Path
) -> None:
    """There the cache's key was the name, so that a reload was answered from the old adapter's keys and values."""
    expected = alone(config, "tenant", "other")

    async def work(engine: AsyncEngine) -> list[Delta]:
        first = await finish(engine, asked("tenant", "1"))
        again = await finish(engine, asked("tenant", "2"))
        swap(adapters, "tenant", "other", originals)
        await asyncio.wrap_future(engine.adapters.load("tenant"))
        changed = await finish(engine, asked("tenant", "3"))
        back = await finish(engine, asked("tenant@1", "4"))
        return [first, again, changed, back]

    first, again, changed, back = with_engine(config, work)
    assert first.token_ids == again.token_ids == back.token_ids == expected["tenant"]
    assert changed.token_ids == expected["other"]
    assert [d.started.adapter_version for d in (first, again, changed, back) if d.started] == [1, 1, 2, 1]
    # The cache works, so that the test means something, and it told the two apart.
    cached = [d.started.cached_tokens for d in (first, again, changed, back) if d.started]
    assert cached[1] > 0 == cached[0] == cached[2]
    assert cached[3] > 0


def test_vllm_7169_each_of_several_adapters_in_one_batch_is_itself(config: EngineConfig) -> None:
    """There only the first adapter of a batch was used."""
    expected = alone(config, "", *CONFIGS)

    async def work(engine: AsyncEngine) -> list[Delta]:
        return await asyncio.gather(*(finish(engine, asked(name, f"together-{name}")) for name in expected))

    assert [delta.token_ids for delta in with_engine(config, work)] == list(expected.values())


def test_sglang_23141_as_many_adapters_as_slots_and_the_base_model_in_one_batch(config: EngineConfig) -> None:
    """There one batch of N adapters and the base model failed an assertion, and the scheduler died. In vLLM 0.32 the
    base model's row then got the last adapter (measured by us).
    """
    expected = alone(config, "", *CONFIGS)
    full = replace(config, max_adapter_slots=len(CONFIGS))

    async def work(engine: AsyncEngine) -> list[Delta]:
        wanted = [asked(name, f"{i}-{name}") for i in range(3) for name in expected]
        answers = await asyncio.gather(*(finish(engine, one) for one in wanted))
        assert engine.adapters.stats().slots_used == len(CONFIGS)
        return list(answers)

    assert [delta.token_ids for delta in with_engine(full, work)] == 3 * list(expected.values())


def add_a_head(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = next(iter(tensors.values())).clone()


def test_tgi_2441_weights_that_would_be_ignored_are_refused(config: EngineConfig, adapters: Path) -> None:
    """There tensors that the server did not know were silently left out of the answer."""
    edit_tensors(adapters / "other", add_a_head)
    edit_config(adapters / "third", use_dora=True)

    async def work(engine: AsyncEngine) -> None:
        for name in ("other", "third"):
            with pytest.raises(AdapterRejectedError):
                await engine.submit(asked(name, name))

    with_engine(config, work)


def test_vllm_11702_one_bad_adapter_hurts_nobody_else(config: EngineConfig, adapters: Path) -> None:
    """There it ended the engine."""
    expected = alone(config, "tenant")
    (adapters / "other" / WEIGHTS_FILE).write_bytes(b"\xff" * 4096)
    edit_config(adapters / "third", gralora_k=3)

    async def work(engine: AsyncEngine) -> Delta:
        async def ask_for_bad_ones() -> None:
            for name in ("other", "third") * 3:
                with pytest.raises(AdapterRejectedError):
                    await engine.submit(asked(name, name))

        return await beside(engine, "tenant", ask_for_bad_ones)

    assert with_engine(config, work).token_ids[:16] == expected["tenant"]


def test_vllm_5105_adapters_that_make_room_for_each_other_all_day(config: EngineConfig) -> None:
    """There the engine died under load by several adapters. Here two slots serve four, in every order."""
    expected = alone(config, *CONFIGS)
    small = replace(config, max_adapter_slots=2)

    async def work(engine: AsyncEngine) -> list[tuple[str, tuple[int, ...]]]:
        names = [name for round_ in range(12) for name in (list(CONFIGS) if round_ % 2 else reversed(CONFIGS))]
        wanted = [asked(name, f"{i}-{name}") for i, name in enumerate(names)]
        deltas = await asyncio.gather(*(finish(engine, one) for one in wanted))
        assert engine.adapters.stats().evictions > 0
        return [(one.adapter, delta.token_ids) for one, delta in zip(wanted, deltas, strict=True)]

    assert all(tokens == expected[name] for name, tokens in with_engine(replace(small, max_queue=200), work))


@contextmanager
def cut_in_the_middle(path: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Somebody truncates the file after its header was read."""
    whole, read_range = path.read_bytes(), loader.read_range

    def cut(file: int, start: int, end: int) -> loader.Array:
        path.write_bytes(whole[: len(whole) // 2])
        return read_range(file, start, end)

    with patch.context() as patched:
        patched.setattr(loader, "read_range", cut)
        yield
    path.write_bytes(whole)


def test_tensorrt_llm_2543_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_crash(
    config: EngineConfig, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There loading ended in a segmentation fault. A mapped file that shrinks would do that here."""
    expected = alone(config, "tenant")

    async def work(engine: AsyncEngine) -> Delta:
        refused = pytest.raises(AdapterRejectedError, match="changed while it was being read")
        with cut_in_the_middle(adapters / "tenant" / WEIGHTS_FILE, monkeypatch), refused:
            await engine.submit(asked("tenant", "cut"))
        return await finish(engine, asked("tenant", "whole"))

    assert with_engine(config, work).token_ids == expected["tenant"]
