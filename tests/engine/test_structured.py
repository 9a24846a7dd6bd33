"""Answers that have to match something, from the whole engine. Its weights are noise, so nothing matches by chance."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from support.peft_adapters import gralora_config, lora_config
from support.structured import COMPACT, SCHEMAS, matches
from support.workspaces import config_of, save_workspace

from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.request import (
    Delta,
    FinishReason,
    GenerationRequest,
    Prompt,
    ResponseParams,
    SamplingParams,
    StoppingParams,
    StructuredOutput,
)
from gralora_runtime.stream import merge_deltas

T = TypeVar("T")
ADAPTERS = {"g0": gralora_config("llama", 8, 2, alpha=32), "lora": lora_config("llama", 5, alpha=20)}
NAMES = ("", *ADAPTERS)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_workspace(tmp_path_factory.mktemp("structured"), ADAPTERS)


@pytest.fixture
def config(workspace: Path) -> EngineConfig:
    return config_of(workspace, device="cpu", max_num_batched_tokens=64)


def with_engine(config: EngineConfig, work: Callable[[AsyncEngine], Awaitable[T]]) -> T:
    async def run() -> T:
        engine = await AsyncEngine.start(config)
        try:
            result = await work(engine)
            assert await engine.wait_idle(30)
            load = engine.load()
            assert (load.running, load.waiting, load.pages_leased, load.adapter_leases) == (0, 0, 0, 0)
            engine._parts.engine.scheduler.check_integrity()
            return result
        finally:
            await engine.close()

    return asyncio.run(run())


def request(
    number: int, output: StructuredOutput | None, *, stopping: StoppingParams | None = None, **sampling: object
) -> GenerationRequest:
    return GenerationRequest(
        request_id=f"r{number}",
        prompt=Prompt(token_ids=tuple(3 + (7 * number + 11 * i) % 300 for i in range(8 + number))),
        adapter=NAMES[number % len(NAMES)],
        sampling=SamplingParams(**{"temperature": 1.0, "seed": number} | sampling),  # type: ignore[arg-type]
        stopping=stopping or StoppingParams(max_tokens=400),
        structured_output=output,
    )


def for_schema(number: int) -> GenerationRequest:
    schema = SCHEMAS[number] if number % 2 else SCHEMAS[number] | COMPACT
    return request(number, StructuredOutput(json_schema=json.dumps(schema)))


WANTED = [for_schema(number) for number in range(len(SCHEMAS))]


async def finish(engine: AsyncEngine, wanted: GenerationRequest) -> Delta:
    stream = await engine.submit(wanted)
    return merge_deltas([delta async for delta in stream])


async def together(engine: AsyncEngine) -> list[Delta]:
    return await asyncio.gather(*(finish(engine, wanted) for wanted in WANTED))


def reasons(deltas: list[Delta]) -> list[FinishReason | None]:
    return [delta.finished and delta.finished.reason for delta in deltas]


@pytest.fixture(scope="module")
def expected(workspace: Path) -> list[Delta]:
    """Each alone, step after step."""

    async def alone(engine: AsyncEngine) -> list[Delta]:
        return [await finish(engine, wanted) for wanted in WANTED]

    made = EngineConfig(
        model=workspace / "model", adapters=in_directory(workspace / "adapters"), device="cpu", num_threads=1,
        kv_cache_bytes=8 << 20, adapter_pool_bytes=8 << 20, page_size=4, pipeline="off", enable_prefix_cache=False,
    )  # fmt: skip
    return with_engine(made, alone)


def test_sixteen_schemas_at_once_all_hold_with_the_tokens_that_each_has_alone(
    config: EngineConfig, expected: list[Delta]
) -> None:
    found = with_engine(config, together)

    for delta, schema in zip(found, SCHEMAS, strict=True):
        assert matches(json.loads(delta.text), schema), delta.text
    assert reasons(found) == [FinishReason.STOP] * len(SCHEMAS)
    assert [delta.token_ids for delta in found] == [delta.token_ids for delta in expected]


@pytest.mark.parametrize(
    "changes",
    [
        {"pipeline": "on"},
        {"enable_prefix_cache": False},
        {"kv_cache_bytes": 160 << 10, "max_model_len": 320},
        {"kv_cache_bytes": 160 << 10, "max_model_len": 320, "pipeline": "on"},
    ],
    ids=["pipelined", "no-prefix-cache", "preempted", "preempted-pipelined"],
)
def test_neither_pipelining_nor_preemption_nor_the_prefix_cache_changes_a_token(
    config: EngineConfig, expected: list[Delta], changes: dict[str, object]
) -> None:
    wanted_len = 320 - max(len(wanted.prompt.token_ids or ()) for wanted in WANTED)
    assert max(len(delta.token_ids) for delta in expected) < wanted_len, "more than fits"
    shorter = [replace(wanted, stopping=StoppingParams(max_tokens=wanted_len)) for wanted in WANTED]

    async def work(engine: AsyncEngine) -> tuple[list[Delta], int]:
        found = [await asyncio.gather(*(finish(engine, wanted) for wanted in shorter)) for _ in range(2)]
        return [delta for deltas in found for delta in deltas], engine.load().preemptions

    found, preemptions = with_engine(replace(config, **changes), work)  # type: ignore[arg-type]

    assert [delta.token_ids for delta in found] == 2 * [delta.token_ids for delta in expected]
    assert [delta.text for delta in found] == 2 * [delta.text for delta in expected]
    assert (preemptions > 0) == ("kv_cache_bytes" in changes), "nobody was preempted: this test would not notice"


@pytest.mark.parametrize("pipeline", ["off", "on"])
def test_a_neighbour_that_asks_for_nothing_has_the_tokens_that_it_has_alone(
    config: EngineConfig, pipeline: str
) -> None:
    plain = [request(number, None, stopping=StoppingParams(max_tokens=40, ignore_eos=True)) for number in (20, 21)]

    async def alone(engine: AsyncEngine) -> list[Delta]:
        return [await finish(engine, wanted) for wanted in plain]

    async def beside(engine: AsyncEngine) -> list[Delta]:
        found = await asyncio.gather(*(finish(engine, wanted) for wanted in [*plain, *WANTED]))
        return list(found[: len(plain)])

    configured = replace(config, pipeline=pipeline)

    assert [delta.token_ids for delta in with_engine(configured, alone)] == [
        delta.token_ids for delta in with_engine(configured, beside)
    ]


FORMATS = {
    "regex": (StructuredOutput(regex=r"[a-f]{4}-\d{3}"), r"[a-f]{4}-\d{3}"),
    "grammar": (
        StructuredOutput(grammar='start: word (" " word){1,2}\nword: "stop" | "then"'),
        r"(stop|then)( (stop|then)){1,2}",
    ),
    "choice": (StructuredOutput(choice=("yes", "no", "perhaps")), "yes|no|perhaps"),
}


@pytest.mark.parametrize("output", FORMATS, ids=str)
def test_every_format_holds_greedily_and_sampled_for_each_adapter(config: EngineConfig, output: str) -> None:
    wanted, pattern = FORMATS[output]

    async def work(engine: AsyncEngine) -> list[Delta]:
        several = [request(i, wanted, temperature=float(i % 2)) for i in range(6)]
        return await asyncio.gather(*(finish(engine, one) for one in several))

    found = with_engine(config, work)

    assert all(re.fullmatch(pattern, delta.text) for delta in found), [delta.text for delta in found]
    assert reasons(found) == [FinishReason.STOP] * 6


def test_any_object_is_one_as_far_as_it_goes(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> Delta:
        return await finish(
            engine, request(1, StructuredOutput(json_object=True), stopping=StoppingParams(max_tokens=30))
        )

    found = with_engine(config, work)

    assert found.text.startswith("{")
    assert reasons([found])[0] in (FinishReason.STOP, FinishReason.LENGTH)
    if reasons([found])[0] is FinishReason.STOP:
        assert isinstance(json.loads(found.text), dict)


def test_max_tokens_breaks_an_answer_off_and_says_so(config: EngineConfig) -> None:
    wanted = request(2, StructuredOutput(regex="[a-z]{60}"), stopping=StoppingParams(max_tokens=5))

    found = with_engine(config, lambda engine: finish(engine, wanted))

    assert len(found.token_ids) == 5
    assert re.fullmatch("[a-z]+", found.text)
    assert reasons([found]) == [FinishReason.LENGTH]


def test_an_answer_that_is_whole_with_its_last_token_has_stopped(config: EngineConfig) -> None:
    """And names no stop condition: none of them was met."""

    async def work(engine: AsyncEngine) -> tuple[Delta, Delta]:
        free = await finish(engine, request(3, StructuredOutput(regex="[0-9]{6}")))
        exact = StoppingParams(max_tokens=len(free.token_ids))
        return free, await finish(engine, request(3, StructuredOutput(regex="[0-9]{6}"), stopping=exact))

    free, exact = with_engine(config, work)

    assert free.token_ids == exact.token_ids
    assert exact.finished is not None
    assert exact.finished.reason is FinishReason.STOP
    assert (exact.finished.stop_string, exact.finished.stop_token_id) == (None, None)


def test_stop_strings_and_min_tokens_hold_beside_it(config: EngineConfig) -> None:
    stop = request(4, StructuredOutput(regex="[a-c]{4}#[a-c]{4}"), stopping=StoppingParams(max_tokens=50, stop=("#",)))
    least = request(5, StructuredOutput(regex="[a-c]{0,60}"), stopping=StoppingParams(max_tokens=60, min_tokens=25))
    whole = request(6, StructuredOutput(choice=("yes",)), stopping=StoppingParams(max_tokens=60, min_tokens=25))

    async def work(engine: AsyncEngine) -> list[Delta]:
        return await asyncio.gather(*(finish(engine, wanted) for wanted in (stop, least, whole)))

    stopped, long, short = with_engine(config, work)

    assert stopped.finished is not None
    assert stopped.finished.stop_string == "#"
    assert re.fullmatch("[a-c]{4}", stopped.text)
    assert len(long.token_ids) >= 25
    assert re.fullmatch("[a-c]{0,60}", long.text)
    assert short.text == "yes"
    assert reasons([short]) == [FinishReason.STOP]


def test_log_probabilities_are_those_of_the_raw_distribution(config: EngineConfig) -> None:
    """A token that the model would hardly have written is reported as unlikely as it is."""
    free = replace(
        request(7, None, stopping=StoppingParams(max_tokens=1), temperature=0.0),
        response=ResponseParams(logprobs=True, top_logprobs=20),
    )
    bound = replace(free, request_id="bound", structured_output=StructuredOutput(choice=("{}",)))

    async def work(engine: AsyncEngine) -> tuple[Delta, Delta]:
        return await finish(engine, free), await finish(engine, bound)

    unbound, constrained = with_engine(config, work)

    assert unbound.logprobs[0].top == constrained.logprobs[0].top
    assert constrained.token_ids != unbound.token_ids
    assert constrained.logprobs[0].logprob < unbound.logprobs[0].logprob
    assert constrained.logprobs[0].logprob != 0.0


BAD = {
    "json_schema": StructuredOutput(json_schema='{"type": "objekt"}'),
    "regex": StructuredOutput(regex="a("),
    "grammar": StructuredOutput(grammar="start: nothing"),
}


def test_what_cannot_be_compiled_is_refused_before_it_has_a_place_and_hinders_nobody(config: EngineConfig) -> None:
    async def refused(engine: AsyncEngine, number: int, field: str) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            await engine.submit(request(number, BAD[field]))
        assert caught.value.field == f"structured_output.{field}"

    async def work(engine: AsyncEngine) -> list[Delta]:
        bad = [refused(engine, 100 + number, field) for number, field in enumerate([*BAD] * 5)]
        good = [finish(engine, wanted) for wanted in WANTED[:4]]
        results = await asyncio.gather(*bad, *good)
        assert engine.load().request_failures == 0
        assert engine.snapshot().requests.ended["invalid_request"] == len(bad)
        return [delta for delta in results if delta is not None]

    found = with_engine(config, work)

    assert all(matches(json.loads(delta.text), schema) for delta, schema in zip(found, SCHEMAS, strict=False))
    assert len(found) == 4


def test_a_request_whose_grammar_comes_to_a_limit_on_the_way_ends_alone(config: EngineConfig) -> None:
    """Its neighbours, of the same grammar even, go on; and its adapter is not blamed."""
    wanted = [replace(WANTED[1], request_id=f"same{i}") for i in range(3)]

    async def work(engine: AsyncEngine) -> list[Delta | BaseException]:
        add = engine._parts.engine.scheduler.add

        def spoiled(sequence) -> None:
            if sequence.request_id == "same1":
                sequence.sampler.matcher.library.consume_token(5)  # as the library is behind a limit: in error
            add(sequence)

        engine._parts.engine.scheduler.add = spoiled  # type: ignore[method-assign]
        return await asyncio.gather(*(finish(engine, one) for one in wanted), return_exceptions=True)

    first, second, third = with_engine(config, work)

    assert isinstance(second, InvalidRequestError)
    assert second.field == "structured_output.json_schema"
    assert isinstance(first, Delta)
    assert isinstance(third, Delta)
    assert first.token_ids == third.token_ids
