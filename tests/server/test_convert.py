"""Wire messages and runtime records say the same."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest
from support.fake_engine import INFO, LOAD, adapter_info

from gralora.v1 import adapters_pb2, generation_pb2, server_pb2
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.info import EngineInfo, EngineLoad
from gralora_runtime.request import (
    ChatMessage,
    Delta,
    Finished,
    FinishReason,
    GenerationRequest,
    Prompt,
    ResponseParams,
    SamplingParams,
    ServedAdapter,
    Started,
    StoppingParams,
    StructuredOutput,
    TokenLogprob,
    WeightedAdapter,
)
from gralora_server import convert


def test_what_a_request_leaves_out_is_the_runtimes_default() -> None:
    wire = generation_pb2.GenerateRequest(request_id="r1", text="hello")

    expected = GenerationRequest(request_id="r1", prompt=Prompt(text="hello"))
    assert expected == convert.from_generate_request(wire, timeout_s=None)
    assert convert.to_min_tokens_per_message(wire.response) == 1


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        ({"json_schema": "{}"}, StructuredOutput(json_schema="{}")),
        ({"regex": "a+"}, StructuredOutput(regex="a+")),
        ({"grammar": 'start: "a"'}, StructuredOutput(grammar='start: "a"')),
        ({"choice": generation_pb2.Choices(texts=["a", "b"])}, StructuredOutput(choice=("a", "b"))),
        ({"json_object": True}, StructuredOutput(json_object=True)),
    ],
    ids=str,
)
def test_what_an_answer_has_to_match_arrives(wire: dict[str, object], expected: StructuredOutput) -> None:
    wanted = generation_pb2.StructuredOutput(**wire)

    for message in (generation_pb2.GenerateRequest, generation_pb2.StreamGenerateRequest):
        request = message(text="hello", structured_output=wanted)
        assert expected == convert.from_generate_request(request, timeout_s=None).structured_output


def test_a_weight_that_is_left_out_is_1() -> None:
    wire = generation_pb2.GenerateRequest(text="hello", adapters=[{"name": "a", "weight": -0.5}, {"name": "b@3"}])

    expected = (WeightedAdapter("a", -0.5), WeightedAdapter("b@3", 1.0))
    assert expected == convert.from_generate_request(wire, timeout_s=None).adapters


def test_an_explicit_zero_is_not_a_default() -> None:
    wire = generation_pb2.SamplingParams(temperature=0, seed=0)

    assert convert.from_sampling(wire) == SamplingParams(temperature=0.0, seed=0)


def test_every_field_of_a_request_arrives() -> None:
    wire = generation_pb2.StreamGenerateRequest(
        request_id="r1",
        adapter="poet",
        messages=generation_pb2.ChatMessages(messages=[generation_pb2.ChatMessage(role="user", content="hi")]),
        sampling=generation_pb2.SamplingParams(
            temperature=0.1,
            top_p=0.2,
            top_k=3,
            min_p=0.4,
            repetition_penalty=1.5,
            presence_penalty=0.6,
            frequency_penalty=0.7,
            seed=8,
            logit_bias={9: 1.25},
        ),
        stopping=generation_pb2.StoppingParams(
            max_tokens=10, min_tokens=1, stop=["a", "b"], stop_token_ids=[2, 3], ignore_eos=True
        ),
        response=generation_pb2.ResponseParams(
            logprobs=True, top_logprobs=5, echo_prompt_token_ids=True, min_tokens_per_message=6
        ),
    )

    expected = GenerationRequest(
        request_id="r1",
        adapter="poet",
        prompt=Prompt(messages=(ChatMessage("user", "hi"),)),
        sampling=SamplingParams(
            temperature=0.1,
            top_p=0.2,
            top_k=3,
            min_p=0.4,
            repetition_penalty=1.5,
            presence_penalty=0.6,
            frequency_penalty=0.7,
            seed=8,
            logit_bias={9: 1.25},
        ),
        stopping=StoppingParams(max_tokens=10, min_tokens=1, stop=("a", "b"), stop_token_ids=(2, 3), ignore_eos=True),
        response=ResponseParams(logprobs=True, top_logprobs=5, echo_prompt_token_ids=True),
        timeout_s=1.5,
    )
    assert expected == convert.from_generate_request(wire, timeout_s=1.5)
    assert convert.to_min_tokens_per_message(wire.response) == 6


def test_token_ids_arrive_as_they_are() -> None:
    wire = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[3, 1, 2]))

    assert convert.from_prompt(wire) == Prompt(token_ids=(3, 1, 2))


def test_every_field_of_a_delta_arrives() -> None:
    delta = Delta(
        text="é",
        token_ids=(1, 2),
        logprobs=(TokenLogprob(1, -0.5, ((1, -0.5), (7, -1.5))), TokenLogprob(2, -0.25)),
        started=Started(
            prompt_tokens=3,
            cached_tokens=2,
            queue_time_s=0.125,
            seed=2**64 - 1,
            adapter="poet",
            adapter_digest="abc",
            prompt_token_ids=(4, 5, 6),
            adapters=(ServedAdapter(name="a", version=3, digest="def", weight=0.5),),
        ),
        finished=Finished(
            reason=FinishReason.STOP,
            prompt_tokens=3,
            cached_tokens=2,
            output_tokens=2,
            stop_string="END",
            preemptions=1,
        ),
    )
    wire = convert.to_stream_response(delta, request_id="r1")

    assert generation_pb2.Started(**asdict(delta.started)) == wire.started
    assert wire.request_id == "r1"
    assert wire.text == "é"
    assert list(wire.token_ids) == [1, 2]
    assert [(top.token_id, top.logprob) for top in wire.logprobs[0].top] == [(1, -0.5), (7, -1.5)]
    assert wire.logprobs[1].logprob == -0.25
    assert wire.finished.reason == generation_pb2.FINISH_REASON_STOP
    assert wire.finished.WhichOneof("matched_stop") == "stop_string"
    usage = wire.finished.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens, wire.finished.preemptions) == (3, 2, 2, 1)
    assert wire.SerializeToString() == convert.to_response(delta, request_id="r1").SerializeToString()


@pytest.mark.parametrize("reason", FinishReason, ids=lambda reason: reason.value)
def test_every_reason_to_finish_has_its_name_on_the_wire(reason: FinishReason) -> None:
    wire = convert.to_finished(Finished(reason=reason, prompt_tokens=1, cached_tokens=0, output_tokens=0))

    assert generation_pb2.FinishReason.Name(wire.reason) == f"FINISH_REASON_{reason.name}"
    assert wire.WhichOneof("matched_stop") is None


def test_a_stop_token_of_id_zero_is_reported() -> None:
    wire = convert.to_finished(
        Finished(reason=FinishReason.STOP, prompt_tokens=1, cached_tokens=0, output_tokens=1, stop_token_id=0)
    )

    assert wire.WhichOneof("matched_stop") == "stop_token_id"


@pytest.mark.parametrize("state", AdapterState, ids=lambda state: state.value)
def test_every_state_of_an_adapter_has_its_name_on_the_wire(state: AdapterState) -> None:
    name = f"ADAPTER_STATE_{state.name}"

    assert name in adapters_pb2.AdapterState.keys()  # noqa: SIM118 - an enum wrapper is no mapping
    assert convert._STATES[state] == adapters_pb2.AdapterState.Value(name)


def test_an_adapter_arrives_with_all_that_is_known() -> None:
    wire = convert.to_adapter(adapter_info("poet", pinned=True))

    assert (wire.name, wire.source, wire.pinned, wire.in_flight) == ("poet", "/adapters/poet", True, 2)
    assert (wire.kind, wire.rank, wire.k, wire.hybrid_rank, wire.equivalent_rank) == ("gralora", 8, 2, 4, 20)
    assert (wire.scale, wire.num_modules, wire.pool_bytes, wire.base_model) == (1.5, 90, 1200, "fake")
    assert wire.last_used.ToMilliseconds() == 1_700_000_000_500
    assert wire.warnings == ["it is odd"]
    assert [list(version.warnings) for version in wire.versions] == [[], ["it is odd"], []]


@pytest.mark.parametrize(
    ("record", "message", "extra"),
    [
        (EngineInfo, server_pb2.GetServerInfoResponse, {"api_version"}),
        (EngineLoad, server_pb2.GetLoadResponse, set()),
    ],
)
def test_what_the_engine_reports_is_what_the_wire_has(record: type, message: type, extra: set[str]) -> None:
    assert {field.name for field in fields(record)} | extra == {field.name for field in message.DESCRIPTOR.fields}


def test_info_and_load_arrive() -> None:
    info, load = convert.to_server_info(INFO), convert.to_load(LOAD)

    assert info.api_version == "gralora.v1"
    assert asdict(INFO) == {name: getattr(info, name) for name in asdict(INFO)}
    assert asdict(LOAD) == {name: getattr(load, name) for name in asdict(LOAD)}
