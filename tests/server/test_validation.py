"""Requests that are refused before anything is done for them: each by the path of its field."""

from __future__ import annotations

import math

import pytest

from gralora.v1 import adapters_pb2, generation_pb2, server_pb2
from gralora_runtime.errors import InvalidRequestError
from gralora_server import validation

SamplingParams = generation_pb2.SamplingParams
StoppingParams = generation_pb2.StoppingParams
ResponseParams = generation_pb2.ResponseParams
NAN, INF = math.nan, math.inf
FLOAT32_MAX, FLOAT32_TINY, SMALLEST = 3.4028234663852886e38, 1.1754943508222875e-38, 5e-324


def request(**fields: object) -> generation_pb2.GenerateRequest:
    prompt = {} if {"text", "token_ids", "messages"} & fields.keys() else {"text": "hello"}
    return generation_pb2.GenerateRequest(**prompt, **fields)


def ids(*values: int) -> generation_pb2.TokenIds:
    return generation_pb2.TokenIds(ids=values)


def turns(*pairs: tuple[str, str]) -> generation_pb2.ChatMessages:
    return generation_pb2.ChatMessages(
        messages=[generation_pb2.ChatMessage(role=role, content=content) for role, content in pairs]
    )


def sampling(**fields: object) -> generation_pb2.GenerateRequest:
    return request(sampling=SamplingParams(**fields))


def stopping(**fields: object) -> generation_pb2.GenerateRequest:
    return request(stopping=StoppingParams(**fields))


def response(**fields: object) -> generation_pb2.GenerateRequest:
    return request(response=ResponseParams(**fields))


def mix(*adapters: tuple[str, float | None], **fields: object) -> generation_pb2.GenerateRequest:
    return request(adapters=[{"name": name, "weight": weight} for name, weight in adapters], **fields)


def structured(**format_: object) -> generation_pb2.GenerateRequest:
    return request(structured_output=generation_pb2.StructuredOutput(**format_))


def choice(*texts: str) -> generation_pb2.GenerateRequest:
    return structured(choice=generation_pb2.Choices(texts=texts))


WRONG = [
    ("prompt", generation_pb2.GenerateRequest()),
    ("text", request(text="")),
    ("text", request(text="x" * ((4 << 20) + 1))),
    ("text", request(text="é" * ((2 << 20) + 1))),
    ("token_ids.ids", request(token_ids=ids())),
    ("token_ids.ids", request(token_ids=ids(1, -1))),
    ("token_ids.ids", request(token_ids=ids(*[1] * ((1 << 20) + 1)))),
    ("messages.messages", request(messages=turns())),
    ("messages.messages", request(messages=turns(*[("user", "hi")] * 4097))),
    ("messages.messages", request(messages=turns(("user", "x" * (3 << 20)), ("user", "x" * (3 << 20))))),
    ("messages.messages[1].role", request(messages=turns(("user", "hi"), ("", "hi")))),
    ("messages.messages[0].role", request(messages=turns(("u" * 65, "hi")))),
    ("request_id", request(request_id="r" * 129)),
    ("request_id", request(request_id="a b")),
    ("request_id", request(request_id="a\n")),
    ("request_id", request(request_id="é")),
    ("adapter", request(adapter="a" * 513)),
    ("canary_key", request(canary_key="a" * 257)),
    ("adapters", mix(("a", 1.0), adapter="b")),
    ("adapters", mix(*[("a", 1.0)] * 5)),
    ("adapters[1].name", mix(("a", 1.0), ("", 1.0))),
    ("adapters[0].name", mix(("a" * 513, 1.0))),
    *(("adapters[1].weight", mix(("a", 1.0), ("b", value))) for value in (0.0, -0.0, 1e-60, 100.1, -1e300, NAN, INF)),
    *(("sampling.temperature", sampling(temperature=value)) for value in (-0.1, 3.5e38, 1e39, NAN, INF, -INF)),
    *(("sampling.top_p", sampling(top_p=value)) for value in (0, -0.5, 1.0001, NAN, INF)),
    ("sampling.top_k", sampling(top_k=-1)),
    *(("sampling.min_p", sampling(min_p=value)) for value in (-0.1, 1.1, NAN, INF)),
    *(
        ("sampling.repetition_penalty", sampling(repetition_penalty=value))
        for value in (0, SMALLEST, FLOAT32_TINY, -1, 10.1, NAN, INF)
    ),
    *(("sampling.presence_penalty", sampling(presence_penalty=value)) for value in (-2.1, 2.1, NAN, -INF)),
    *(("sampling.frequency_penalty", sampling(frequency_penalty=value)) for value in (-2.1, 2.1, NAN, INF)),
    *(("sampling.logit_bias[5]", sampling(logit_bias={5: value})) for value in (-100.1, 100.1, NAN, INF)),
    ("sampling.logit_bias", sampling(logit_bias={-1: 0.0})),
    ("sampling.logit_bias", sampling(logit_bias=dict.fromkeys(range(1025), 0.0))),
    *(("stopping.max_tokens", stopping(max_tokens=value)) for value in (0, -1)),
    ("stopping.min_tokens", stopping(min_tokens=-1)),
    ("stopping.min_tokens", stopping(min_tokens=5, max_tokens=4)),
    ("stopping.stop", stopping(stop=["x"] * 17)),
    ("stopping.stop[1]", stopping(stop=["x", ""])),
    ("stopping.stop[0]", stopping(stop=["x" * 1001])),
    ("stopping.stop_token_ids", stopping(stop_token_ids=[1, -2])),
    ("stopping.stop_token_ids", stopping(stop_token_ids=range(1025))),
    *(("response.top_logprobs", response(logprobs=True, top_logprobs=value)) for value in (-1, 21)),
    ("response.top_logprobs", response(top_logprobs=1)),
    *(("response.min_tokens_per_message", response(min_tokens_per_message=value)) for value in (0, -1, 1025)),
    ("structured_output", structured()),
    ("structured_output.json_schema", structured(json_schema="")),
    ("structured_output.json_schema", structured(json_schema=" " * ((64 << 10) + 1))),
    ("structured_output.json_schema", structured(json_schema="é" * ((32 << 10) + 1))),
    ("structured_output.regex", structured(regex="")),
    ("structured_output.regex", structured(regex="a" * ((8 << 10) + 1))),
    ("structured_output.grammar", structured(grammar="")),
    ("structured_output.grammar", structured(grammar="a" * ((64 << 10) + 1))),
    ("structured_output.choice.texts", choice()),
    ("structured_output.choice.texts", choice(*["a"] * 513)),
    ("structured_output.choice.texts", choice("a" * (32 << 10), "b" * ((32 << 10) + 1))),
    ("structured_output.choice.texts[1]", choice("a", "")),
    ("structured_output.json_object", structured(json_object=False)),
]
RIGHT = [
    request(),
    request(token_ids=ids(0)),
    request(messages=turns(("system", ""), ("user", "hi"))),
    request(text="x" * (4 << 20)),
    request(request_id="!~" * 64, adapter="a" * 512, canary_key="a" * 256),
    mix(("a" * 512, 100.0), ("b", -100.0), ("a@3", 1e-30), ("b", None)),
    sampling(temperature=0, top_p=1, top_k=0, min_p=0, repetition_penalty=1),
    sampling(temperature=1e-30, top_p=1e-9, top_k=1 << 30, min_p=1, repetition_penalty=10),
    sampling(temperature=FLOAT32_MAX, top_p=SMALLEST, min_p=SMALLEST, repetition_penalty=1.2e-38),
    sampling(temperature=SMALLEST, presence_penalty=SMALLEST, frequency_penalty=-SMALLEST, logit_bias={0: SMALLEST}),
    sampling(presence_penalty=-2, frequency_penalty=2, seed=2**64 - 1, logit_bias={0: -100, 1: 100}),
    stopping(max_tokens=1, min_tokens=1, stop=["x" * 1000] * 16, stop_token_ids=range(1024)),
    stopping(min_tokens=5),
    response(logprobs=True, top_logprobs=20, min_tokens_per_message=1024),
    structured(json_schema="{" * (64 << 10)),
    structured(regex="a" * (8 << 10)),
    structured(grammar="é" * (32 << 10)),
    choice(*["a" * 128] * 512),
    structured(json_object=True),
]


@pytest.mark.parametrize(("field", "wrong"), WRONG, ids=[f"{i}-{field}" for i, (field, _) in enumerate(WRONG)])
def test_a_wrong_field_is_named_by_its_path(field: str, wrong: generation_pb2.GenerateRequest) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validation.validate_generate(wrong)

    assert field == caught.value.field
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (sampling(temperature=1e39), "sampling.temperature: must be 0 to 3.40282e+38 (got 1e+39)"),
        (sampling(temperature=NAN), "sampling.temperature: must be 0 to 3.40282e+38 (got nan)"),
        (
            sampling(repetition_penalty=1e-320),
            "sampling.repetition_penalty: must be 1.2e-38 to 10 (got 1e-320)",
        ),
    ],
)
def test_a_number_beyond_float32_is_told_the_bounds(wrong: generation_pb2.GenerateRequest, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validation.validate_generate(wrong)

    assert message == str(caught.value)


@pytest.mark.parametrize("right", RIGHT, ids=range(len(RIGHT)))
def test_the_edges_of_what_is_allowed_are_allowed(right: generation_pb2.GenerateRequest) -> None:
    validation.validate_generate(right)


def test_both_kinds_of_request_have_the_same_fields() -> None:
    """What is validated and converted for one holds for the other."""
    unary, stream = (
        [(field.name, field.number, field.type) for field in kind.DESCRIPTOR.fields]
        for kind in (generation_pb2.GenerateRequest, generation_pb2.StreamGenerateRequest)
    )

    assert unary == stream


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("prompt", server_pb2.TokenizeRequest()),
        ("text", server_pb2.TokenizeRequest(text="")),
        ("messages.messages", server_pb2.TokenizeRequest(messages=turns())),
    ],
)
def test_tokenize_needs_a_prompt(field: str, wrong: server_pb2.TokenizeRequest) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validation.validate_tokenize(wrong)

    assert field == caught.value.field


@pytest.mark.parametrize("name", ["", "../x", "a/b/c", "a@3", "a b", ".hidden", "x" * 129, "é"])
def test_an_adapter_gets_no_name_that_could_be_a_path(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validation.validate_load(adapters_pb2.LoadAdapterRequest(name=name))

    assert caught.value.field == "name"


def test_a_path_longer_than_any_system_takes_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validation.validate_load(adapters_pb2.LoadAdapterRequest(name="a", path="x" * 4097))

    assert caught.value.field == "path"


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 129])
def test_abort_needs_an_id(request_id: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validation.validate_named_request(server_pb2.AbortRequestRequest(request_id=request_id))

    assert caught.value.field == "request_id"
