"""vLLM's protocol against a server in a process of its own, as Dynamo uses it, beside our own on the same port."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.vllm_grpc import Request, Response, as_dynamo, generate, text_of, tokens_of

from e2e.conftest import assert_idle, serving
from gralora.foreign import vllm_pb2, vllm_pb2_grpc
from gralora_server import Client

PROMPT = (5, 6, 7, 8)
LONG = 400
# What a seed is told with is exact in the 32 bits of theirs.
SAMPLED = {"temperature": 0.75, "top_p": 0.875, "top_k": 20, "min_p": 0.03125, "seed": 11}


@pytest.fixture(scope="module")
def server(tiny_workspace: Path) -> Iterator[str]:
    with serving(tiny_workspace / "model", tiny_workspace / "adapters", "--threads", "1", "--vllm-grpc") as address:
        yield address


@pytest.fixture(scope="module")
def channel(server: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server) as channel:
        yield channel


@pytest.fixture
def inference(channel: grpc.Channel) -> vllm_pb2_grpc.InferenceStub:
    return vllm_pb2_grpc.InferenceStub(channel)


@pytest.fixture
def control(channel: grpc.Channel) -> vllm_pb2_grpc.ControlStub:
    return vllm_pb2_grpc.ControlStub(channel)


@pytest.fixture
def ours(server: str) -> Iterator[Client]:
    """A client of our own protocol; afterwards nothing may be left in the server."""
    with Client(server) as client:
        yield client
        assert_idle(client)


def asked(request_id: str = "", **fields: Any) -> Request:
    return as_dynamo(request_id, PROMPT, **{"model": "model"} | fields)


def streamed(inference: vllm_pb2_grpc.InferenceStub, **fields: Any) -> list[Response]:
    return list(inference.GenerateStream(asked(**fields)))


@pytest.mark.parametrize("adapter", ["", "a0", "a1", "a2", "a1@1"])
def test_greedy_answers_are_those_of_our_own_protocol(
    inference: vllm_pb2_grpc.InferenceStub, ours: Client, adapter: str
) -> None:
    expected = ours.generate(token_ids=PROMPT, adapter=adapter, max_tokens=8, temperature=0, stop_token_ids=[2])
    messages = streamed(inference, lora_name=adapter)
    once = inference.Generate(asked(lora_name=adapter))

    assert tokens_of(messages) == tokens_of([once]) == list(expected.token_ids)
    assert text_of(messages) == text_of([once]) == expected.text
    assert messages[0].prompt_info.num_prompt_tokens == len(PROMPT)
    assert messages[-1].outputs.finish_info.num_output_tokens == len(expected.token_ids)


def test_drawn_answers_are_those_of_our_own_protocol(inference: vllm_pb2_grpc.InferenceStub, ours: Client) -> None:
    drawing = {name: value for name, value in SAMPLED.items() if name != "temperature"}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.25}
    expected = ours.generate(
        token_ids=PROMPT, adapter="a0", max_tokens=16, logit_bias={9: 2.0}, ignore_eos=True, **SAMPLED, **penalties
    )
    messages = streamed(
        inference,
        lora_name="a0",
        temperature=SAMPLED["temperature"],
        sampling=drawing,
        decoding=penalties | {"logit_bias": {9: 2.0}},
        stopping={"max_new_tokens": 16, "ignore_eos": True},
    )

    assert tokens_of(messages) == list(expected.token_ids)


def test_a_text_is_tokenized_as_ours_is(inference: vllm_pb2_grpc.InferenceStub, ours: Client) -> None:
    expected = ours.generate("stop here", adapter="a1", max_tokens=20, temperature=0)
    answer = inference.Generate(generate("stop here", lora_name="a1", response={"prompt_token_ids": True}))

    assert answer.outputs.text == expected.text
    assert list(answer.prompt_info.token_ids) == list(ours.tokenize("stop here").token_ids)


def test_log_probabilities_are_ours(inference: vllm_pb2_grpc.InferenceStub, ours: Client) -> None:
    expected = ours.generate(token_ids=PROMPT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3)
    wanted = {"output_token_ids": True, "output_logprobs": True, "output_candidates": {"top_n": 3}}
    messages = streamed(inference, stopping={"max_new_tokens": 4}, response=wanted)
    outputs = [message.outputs for message in messages]

    assert [value for one in outputs for value in one.logprobs] == [one.logprob for one in expected.logprobs]
    assert {rank for one in outputs for rank in one.ranks} == {1}
    rivals = [[(t.id, t.logprob) for t in one.tokens] for output in outputs for one in output.candidate_tokens]
    assert rivals == [list(one.top[1:]) for one in expected.logprobs]


@pytest.mark.parametrize(
    ("decoding", "pattern"),
    [
        ({"regex": r"[a-f]{3}\d"}, r"[a-f]{3}\d"),
        ({"choice": {"choices": ["yes", "no"]}}, "yes|no"),
        ({"grammar": 'start: ("a" | "b") "!"'}, "[ab]!"),
        ({"json": json.dumps({"enum": ["yes", "no"]})}, '"(yes|no)"'),
    ],
    ids=["regex", "choice", "grammar", "json"],
)
def test_an_answer_matches_what_it_has_to(
    inference: vllm_pb2_grpc.InferenceStub, ours: Client, decoding: dict[str, Any], pattern: str
) -> None:
    messages = streamed(inference, decoding=decoding, stopping={"max_new_tokens": 50})

    assert re.fullmatch(pattern, text_of(messages)), text_of(messages)
    assert messages[-1].outputs.finish_info.finish_reason == vllm_pb2.FinishInfo.STOP


def test_stops_are_told(inference: vllm_pb2_grpc.InferenceStub, ours: Client) -> None:
    whole = ours.generate(token_ids=PROMPT, max_tokens=12, temperature=0, ignore_eos=True)
    token = whole.token_ids[5]
    by_token = streamed(inference, stopping={"max_new_tokens": 12, "ignore_eos": True, "stop_token_ids": [token]})
    stop = whole.text[2:5]
    by_string = streamed(inference, stopping={"max_new_tokens": 12, "ignore_eos": True, "stop_strings": [stop]})

    assert tokens_of(by_token) == list(whole.token_ids[: whole.token_ids.index(token) + 1])
    assert by_token[-1].outputs.finish_info.stop_token_id == token
    assert text_of(by_string) == whole.text[: whole.text.index(stop)]
    assert by_string[-1].outputs.finish_info.stop_string == stop


def test_a_client_that_leaves_frees_its_pages(inference: vllm_pb2_grpc.InferenceStub, ours: Client) -> None:
    call = inference.GenerateStream(asked("left", stopping={"max_new_tokens": LONG, "ignore_eos": True}))
    while not next(call).outputs.num_tokens:
        pass
    during = ours.load()
    call.cancel()

    assert during.pages_leased > 0
    assert_idle(ours)


def test_an_abort_ends_a_request_with_what_it_has(
    inference: vllm_pb2_grpc.InferenceStub, control: vllm_pb2_grpc.ControlStub, ours: Client
) -> None:
    call = inference.GenerateStream(asked("ended", stopping={"max_new_tokens": LONG, "ignore_eos": True}))
    first = next(call)
    control.Abort(vllm_pb2.AbortRequest(request_ids=["ended"]))
    messages = [first, *call]

    assert messages[-1].outputs.finish_info.finish_reason == vllm_pb2.FinishInfo.ABORTED
    assert messages[-1].outputs.finish_info.num_output_tokens == len(tokens_of(messages)) < LONG


def test_adapters_are_loaded_from_a_path_listed_and_unloaded(
    inference: vllm_pb2_grpc.InferenceStub,
    control: vllm_pb2_grpc.ControlStub,
    ours: Client,
    tiny_workspace: Path,
) -> None:
    path = tiny_workspace / "adapters" / "cache" / "of" / "dynamo"
    shutil.copytree(tiny_workspace / "adapters" / "a0", path)
    loaded = control.LoadLora(vllm_pb2.LoadLoraRequest(lora_name="fresh", source_path=str(path))).adapter
    listed = {one.lora_name: one for one in control.ListLoras(vllm_pb2.ListLorasRequest()).adapters}
    answer = ours.generate(token_ids=PROMPT, adapter="a0", max_tokens=8, temperature=0)
    found = tokens_of(streamed(inference, lora_name="fresh", stopping={"max_new_tokens": 8}))
    control.UnloadLora(vllm_pb2.UnloadLoraRequest(lora_name="fresh"))
    after = {one.lora_name for one in control.ListLoras(vllm_pb2.ListLorasRequest()).adapters}
    with pytest.raises(grpc.RpcError) as caught:
        streamed(inference, lora_name="fresh")

    assert listed["fresh"] == loaded
    assert listed.keys() >= {"a0", "a1", "a2"}
    assert found == list(answer.token_ids)
    assert "fresh" not in after
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_path_outside_of_the_adapters_directories_is_refused(
    control: vllm_pb2_grpc.ControlStub, tmp_path: Path, tiny_workspace: Path
) -> None:
    outside = tmp_path / "adapter"
    shutil.copytree(tiny_workspace / "adapters" / "a0", outside)
    with pytest.raises(grpc.RpcError) as caught:
        control.LoadLora(vllm_pb2.LoadLoraRequest(lora_name="outside", source_path=str(outside)))

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("source_path: ")


def test_the_model_that_it_tells_of_is_there(control: vllm_pb2_grpc.ControlStub, tiny_workspace: Path) -> None:
    info = control.GetModelInfo(vllm_pb2.GetModelInfoRequest())

    assert Path(info.model_id) == tiny_workspace / "model"
    assert (Path(info.model_id) / "tokenizer.json").exists()
    assert info.served_model_name == "model"
