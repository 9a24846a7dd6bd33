"""Requests for adapters with more tokens than the base model: which ids they may name, and which they are answered."""

from __future__ import annotations

import asyncio
from pathlib import Path
from shutil import copytree
from typing import Any

import grpc
import pytest
from support.grpc_harness import served
from support.larger import BOTH, FROM_NEW, NEW, NUM_TOKENS, answer, peft_answer, save_larger, save_loud, started
from support.peft_adapters import gralora_config, lora_config
from support.served import PROMPT
from support.tiny_models import VOCAB_SIZE
from support.workspaces import save_workspace

from gralora.v1 import generation_pb2
from gralora_runtime.adapters.checkpoint.golden import Golden, GoldenCase, write_golden
from gralora_runtime.errors import AdapterRejectedError, InvalidRequestError
from gralora_runtime.request import (
    GenerationRequest,
    Prompt,
    ResponseParams,
    SamplingParams,
    StoppingParams,
    StructuredOutput,
    WeightedAdapter,
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_workspace(tmp_path_factory.mktemp("added"), {"plain": gralora_config("llama", 4, 2)})
    save_loud(root / "adapters" / "loud")
    save_larger("llama", lora_config("llama", 4, **BOTH), root / "adapters" / "quiet", added=2)
    return root


@pytest.mark.parametrize("pipeline", ["off", "on"])
async def test_added_tokens_are_read_and_answered_as_by_peft_and_nobody_else_gets_one(
    workspace: Path, pipeline: str
) -> None:
    expected = peft_answer(workspace / "adapters" / "loud", FROM_NEW)
    assert set(expected) & set(NEW), "this test could not fail"
    async with started(workspace, pipeline=pipeline) as engine:
        alone = {name: await answer(engine, name) for name in ("", "plain", "quiet")}
        names = ("", "loud", "plain", "quiet")
        together = await asyncio.gather(
            *(answer(engine, name, FROM_NEW if name == "loud" else PROMPT) for name in names)
        )

    found = dict(zip(names, together, strict=True))
    assert list(found["loud"].token_ids) == expected
    for name, delta in alone.items():
        assert found[name].token_ids == delta.token_ids, name


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0, seed=1, top_k=3),
        SamplingParams(temperature=1.0, seed=1, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.1),
        SamplingParams(temperature=0.0, logit_bias={NEW[0]: 300.0}),
        SamplingParams(temperature=1.0, seed=1, top_p=0.9, frequency_penalty=0.2),
    ],
    ids=["top-k", "min-p and penalties", "bias", "top-p"],
)
async def test_every_rule_of_sampling_knows_them(workspace: Path, sampling: SamplingParams) -> None:
    """Also beside others, whose rules stay theirs."""
    reports = {"response": ResponseParams(logprobs=True, top_logprobs=4), "sampling": sampling}
    others = {"sampling": SamplingParams(temperature=1.0, seed=5), "response": ResponseParams(logprobs=True)}
    async with started(workspace) as engine:
        alone = await answer(engine, "plain", **others)
        loud, beside = await asyncio.gather(
            answer(engine, "loud", FROM_NEW, **reports), answer(engine, "plain", **others)
        )

    assert set(loud.token_ids) & set(NEW)
    assert all(0 <= token < VOCAB_SIZE + len(NEW) for one in loud.logprobs for token, _ in one.top)
    assert beside == alone or (beside.token_ids, beside.logprobs) == (alone.token_ids, alone.logprobs)
    if sampling.logit_bias:
        assert set(loud.token_ids) == {NEW[0]}


async def test_an_added_token_may_end_an_answer(workspace: Path) -> None:
    first = peft_answer(workspace / "adapters" / "loud", FROM_NEW)
    end = next(token for token in first if token in NEW)
    stopping = StoppingParams(max_tokens=NUM_TOKENS, ignore_eos=True, stop_token_ids=frozenset({end}))
    async with started(workspace) as engine:
        found = await answer(engine, "loud", FROM_NEW, stopping=stopping)

    assert list(found.token_ids) == first[: first.index(end) + 1]
    assert found.finished.stop_token_id == end


async def test_answers_that_match_something_are_made_of_the_base_models_tokens(workspace: Path) -> None:
    stopping = StoppingParams(max_tokens=NUM_TOKENS, stop_token_ids=frozenset({NEW[0]}))
    wanted = StructuredOutput(regex="(yes|no){2}")
    async with started(workspace) as engine:
        await answer(engine, "loud")  # or it would come when the others have ended
        alone = await answer(engine, "", structured_output=wanted)
        found, beside, _ = await asyncio.gather(
            answer(engine, "loud", FROM_NEW, stopping=stopping, structured_output=wanted),
            answer(engine, "", structured_output=wanted),
            answer(engine, "loud", FROM_NEW, request_id="free"),
        )

    assert max(found.token_ids) < VOCAB_SIZE
    assert beside.token_ids == alone.token_ids


@pytest.mark.parametrize(
    ("adapter", "most"),
    [("", VOCAB_SIZE), ("plain", VOCAB_SIZE), ("quiet", VOCAB_SIZE + 2), ("loud", VOCAB_SIZE + 3)],
)
async def test_an_id_that_the_adapter_does_not_have_is_refused_by_its_field(
    workspace: Path, adapter: str, most: int
) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("token_ids[2]", {"prompt": [5, 6, most]}),
        ("sampling.logit_bias", {"sampling": SamplingParams(temperature=0.0, logit_bias={most: 1.0})}),
        ("stopping.stop_token_ids", {"stopping": StoppingParams(max_tokens=2, stop_token_ids=frozenset({most}))}),
    ]
    async with started(workspace) as engine:
        for field, asked in wrong:
            with pytest.raises(InvalidRequestError) as refusal:
                await answer(engine, adapter, **asked)
            assert (refusal.value.field, refusal.value.value) == (field, str(most))
        assert engine.load().adapter_leases == 0
        last = {"prompt": [5, 6, most - 1]}
        assert len((await answer(engine, adapter, **last)).token_ids) == NUM_TOKENS


async def test_a_sum_has_no_added_tokens(workspace: Path) -> None:
    async with started(workspace) as engine:
        request = GenerationRequest(
            request_id="sum", adapters=tuple(map(WeightedAdapter, ("loud", "plain"))), prompt=Prompt(token_ids=(5, 6))
        )
        with pytest.raises(AdapterRejectedError, match="3 tokens more than the base model"):
            await engine.submit(request)


async def test_as_many_as_the_setting_says_and_no_more(workspace: Path) -> None:
    async with started(workspace, max_added_tokens=2) as engine:
        await answer(engine, "quiet", [5, VOCAB_SIZE + 1])
        with pytest.raises(AdapterRejectedError, match=r"323 tokens, 3 more .* takes at most 2 \(--max-added-tokens\)"):
            await answer(engine, "loud")
    async with started(workspace, max_added_tokens=0) as engine:
        with pytest.raises(AdapterRejectedError, match="shape"):
            await answer(engine, "quiet")


async def test_golden_prompts_may_have_them(workspace: Path, tmp_path: Path) -> None:
    folder = copytree(workspace / "adapters" / "loud", tmp_path / "adapters" / "loud")
    copytree(workspace / "model", tmp_path / "model")
    expected = tuple(peft_answer(folder, FROM_NEW))
    case = GoldenCase(prompt_token_ids=tuple(FROM_NEW), expected_token_ids=expected)
    write_golden(folder, Golden(model="", cases=(case,)), vocab_size=VOCAB_SIZE + len(NEW))
    async with started(tmp_path) as engine:
        found = await answer(engine, "loud", FROM_NEW)

    assert found.token_ids == expected


async def test_one_prompts_pages_are_each_adapters_own(workspace: Path) -> None:
    """The second finds nothing that the first has left, and the third all of it."""
    prompt = [*PROMPT[:16], NEW[1], *PROMPT[16:]]
    async with started(workspace) as engine:
        loud, quiet, again = [
            await answer(engine, name, prompt, request_id=f"{at}") for at, name in enumerate(("loud", "quiet", "loud"))
        ]

    assert (loud.started.cached_tokens, quiet.started.cached_tokens) == (0, 0)
    assert again.started.cached_tokens > len(PROMPT) - 8
    assert again.token_ids == loud.token_ids == tuple(peft_answer(workspace / "adapters" / "loud", prompt))


async def test_through_grpc(workspace: Path) -> None:
    expected = peft_answer(workspace / "adapters" / "loud", FROM_NEW)

    def request(adapter: str) -> generation_pb2.GenerateRequest:
        asked = generation_pb2.GenerateRequest(adapter=adapter)
        asked.token_ids.ids.extend(FROM_NEW)
        asked.sampling.temperature = 0.0
        asked.stopping.max_tokens, asked.stopping.ignore_eos = NUM_TOKENS, True
        return asked

    async with started(workspace) as engine, served(engine=engine) as server:
        found = await server.client.generation.Generate(request("loud"))
        for other, whose in (("", "model"), ("plain", "adapter")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await server.client.generation.Generate(request(other))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "token_ids[6]" in refused.value.details()
            assert f"token ids of this {whose} are 0 to 319" in refused.value.details()

    assert list(found.token_ids) == expected
