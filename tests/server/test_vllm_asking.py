"""What a request of vLLM's protocol becomes: each field where ours has it, and none passed over."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vllm_grpc import Request, as_dynamo, generate

from gralora.foreign import vllm_pb2
from gralora.v1 import generation_pb2
from gralora_runtime.errors import InvalidRequestError
from gralora_server.validation import validate_generate
from gralora_server.vllm_grpc.asking import Asked, read_request
from gralora_server.vllm_grpc.naming import GENERATION, in_their_words

UINT32, INT32 = st.integers(0, 2**32 - 1), st.integers(-(2**31), 2**31 - 1)
SMALL = st.sampled_from([0, 1, 2, 20, 21, 100, 101])
FLOATS = st.sampled_from([0.0, 0.5, 1.0, 1.5, -1.0, math.inf, math.nan])
# Fields that are refused whatever the rest of a request is.
NOT_SERVED: dict[str, dict[str, Any]] = {
    "sampling.num_sequences": {"sampling": {"num_sequences": 2}},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 1},
    "media": {"media": [{}]},
    "decoding.allowed_token_ids": {"decoding": {"allowed_token_ids": [0]}},
    "decoding.structural_tag": {"decoding": {"structural_tag": ""}},
    "stopping.include_stop_strings": {"stopping": {"include_stop_strings": True}},
    "response.prompt_logprobs": {"response": {"prompt_logprobs": True}},
    "response.prompt_candidates": {"response": {"prompt_candidates": {}}},
    "response.output_candidates.token_ids": {
        "response": {"output_logprobs": True, "output_candidates": {"token_ids": {"ids": [1]}}}
    },
    "response.output_candidates.all": {"response": {"output_logprobs": True, "output_candidates": {"all": True}}},
    "response.skip_special_tokens": {"response": {"skip_special_tokens": False}},
    "kv.bypass_prefix_cache": {"kv": {"bypass_prefix_cache": True}},
    "kv.cache_salt": {"kv": {"cache_salt": "s"}},
    "kv.kv_transfer_params": {"kv": {"kv_transfer_params": {}}},
    "kv.ec_transfer_params": {"kv": {"ec_transfer_params": {}}},
}


def read(request: Request) -> Asked:
    return read_request(request, base="fake")


def refused(request: Request) -> InvalidRequestError:
    """By what reads it, or by what is asked next."""
    with pytest.raises(InvalidRequestError) as caught, in_their_words(GENERATION):
        validate_generate(read(request).generation)
    return caught.value


def test_what_is_not_said_is_as_vllm_has_it() -> None:
    asked = read(generate())

    generation = generation_pb2.StreamGenerateRequest(text="hello")
    generation.sampling.temperature = 0.0
    generation.stopping.max_tokens = 20
    generation.response.echo_prompt_token_ids = False
    assert asked.generation == generation
    assert (asked.text, asked.token_ids, asked.logprobs) == (True, False, False)


def test_every_field_arrives_where_ours_has_it() -> None:
    request = generate(
        request_id="r1",
        model="fake",
        temperature=0.5,
        sampling={"num_sequences": 1, "top_k": 7, "top_p": 0.25, "min_p": 0.125, "seed": 2**63 - 1},
        decoding={
            "presence_penalty": -1.0,
            "frequency_penalty": 0.75,
            "repetition_penalty": 1.5,
            "logit_bias": {5: -100.0, 6: 1.5},
            "json": '{"type": "boolean"}',
        },
        stopping={
            "max_new_tokens": 9,
            "min_new_tokens": 2,
            "stop_token_ids": [3, 4],
            "stop_strings": ["a", "b"],
            "ignore_eos": True,
        },
        response={
            "prompt_token_ids": True,
            "output_text": False,
            "output_token_ids": True,
            "output_logprobs": True,
            "output_candidates": {"top_n": 5},
            "skip_special_tokens": True,
        },
        kv={},
        priority=-3,
        session_id="u1",
        lora_name="poet@3",
    )
    asked = read(request)

    expected = generation_pb2.StreamGenerateRequest(
        request_id="r1", text="hello", adapter="poet@3", canary_key="u1", priority=3
    )
    sampling, stopping = expected.sampling, expected.stopping
    sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p = 0.5, 0.25, 7, 0.125
    sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty = 1.5, -1, 0.75
    sampling.seed, sampling.logit_bias[5], sampling.logit_bias[6] = 2**63 - 1, -100, 1.5
    stopping.max_tokens, stopping.min_tokens, stopping.ignore_eos = 9, 2, True
    stopping.stop.extend(["a", "b"])
    stopping.stop_token_ids.extend([3, 4])
    expected.structured_output.json_schema = '{"type": "boolean"}'
    expected.response.logprobs, expected.response.top_logprobs = True, 20
    expected.response.echo_prompt_token_ids = True
    assert asked.generation == expected
    assert (asked.text, asked.token_ids, asked.logprobs, asked.num_candidates) == (False, True, True, 5)


def test_a_request_of_dynamos_is_one() -> None:
    asked = read(as_dynamo(ids=(5, 6, 7)))

    validate_generate(asked.generation)
    assert list(asked.generation.token_ids.ids) == [5, 6, 7]
    assert list(asked.generation.stopping.stop_token_ids) == [2]
    assert (asked.text, asked.token_ids) == (True, True)


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        ({"json": "{}"}, {"json_schema": "{}"}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"choice": {"choices": ["yes", "no"]}}, {"choice": {"texts": ["yes", "no"]}}),
        ({"grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"json_object": True}, {"json_object": True}),
    ],
    ids=["json", "regex", "choice", "grammar", "object"],
)
def test_what_an_answer_has_to_match_arrives(decoding: dict[str, Any], expected: dict[str, Any]) -> None:
    generation = read(generate(decoding=decoding)).generation

    assert generation.structured_output == generation_pb2.StructuredOutput(**expected)


@pytest.mark.parametrize("decoding", [{}, {"json_object": False}], ids=["nothing", "false"])
def test_an_answer_may_be_anything(decoding: dict[str, Any]) -> None:
    assert not read(generate(decoding=decoding)).generation.HasField("structured_output")


@pytest.mark.parametrize(("theirs", "ours"), [(0, 0), (-100, 100), (7, -7)])
def test_their_lowest_priority_is_our_highest(theirs: int, ours: int) -> None:
    assert read(generate(priority=theirs)).generation.priority == ours


@pytest.mark.parametrize("seed", [{}, {"seed": -1}], ids=["not-set", "none"])
def test_a_seed_need_not_be_there(seed: dict[str, int]) -> None:
    assert not read(generate(sampling=seed)).generation.sampling.HasField("seed")


def test_a_seed_of_0_is_one() -> None:
    assert read(generate(sampling={"seed": 0})).generation.sampling.HasField("seed")


@pytest.mark.parametrize(
    ("response", "count"),
    [
        ({"output_logprobs": True}, 1),
        ({"output_logprobs": True, "output_candidates": {}}, 1),
        ({"output_logprobs": True, "output_candidates": {"top_n": 0}}, 0),
        ({"output_logprobs": True, "output_candidates": {"top_n": 20}}, 20),
    ],
)
def test_log_probabilities_have_as_many_rivals_as_are_asked_for(response: dict[str, Any], count: int) -> None:
    assert read(generate(response=response)).num_candidates == count


@pytest.mark.parametrize("field", NOT_SERVED)
def test_what_this_server_does_not_do_is_refused_by_its_field(field: str) -> None:
    error = refused(generate(**NOT_SERVED[field]))

    assert error.field == field
    assert "is nothing that this server does" in error.problem


@pytest.mark.parametrize("field", NOT_SERVED)
def test_every_field_that_is_refused_is_one_of_theirs(field: str) -> None:
    assert is_theirs(field)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (generate(""), "text"),
        (Request(), "prompt"),
        (Request(token_ids={}), "token_ids.ids"),
        (Request(token_ids={"ids": [2**31]}), "token_ids.ids"),
        (generate(model="other"), "model"),
        (generate(request_id="two words"), "request_id"),
        (generate(lora_name="x" * 600), "lora_name"),
        (generate(session_id="x" * 300), "session_id"),
        (generate(priority=101), "priority"),
        (generate(priority=-(2**31)), "priority"),
        (generate(temperature=-1.0), "temperature"),
        (generate(temperature=math.nan), "temperature"),
        (generate(sampling={"top_p": 1.5}), "sampling.top_p"),
        (generate(sampling={"top_p": math.nan}), "sampling.top_p"),
        (generate(sampling={"min_p": -0.5}), "sampling.min_p"),
        (generate(sampling={"top_k": 2**31}), "sampling.top_k"),
        (generate(sampling={"seed": -2}), "sampling.seed"),
        (generate(decoding={"presence_penalty": 3.0}), "decoding.presence_penalty"),
        (generate(decoding={"frequency_penalty": -3.0}), "decoding.frequency_penalty"),
        (generate(decoding={"repetition_penalty": -1.0}), "decoding.repetition_penalty"),
        (generate(decoding={"logit_bias": {2**31: 1.0}}), "decoding.logit_bias"),
        (generate(decoding={"logit_bias": {5: 101.0}}), "decoding.logit_bias[5]"),
        (generate(decoding={"json": ""}), "decoding.json"),
        (generate(decoding={"regex": "a" * 9000}), "decoding.regex"),
        (generate(decoding={"choice": {}}), "decoding.choice.choices"),
        (generate(decoding={"grammar": ""}), "decoding.grammar"),
        (generate(stopping={"max_new_tokens": 2**31}), "stopping.max_new_tokens"),
        (generate(stopping={"min_new_tokens": 21}), "stopping.min_new_tokens"),
        (generate(stopping={"stop_strings": [""]}), "stopping.stop_strings[0]"),
        (generate(stopping={"stop_token_ids": [2**31]}), "stopping.stop_token_ids"),
        (generate(stopping={"stop_token_ids": [1] * 1025}), "stopping.stop_token_ids"),
        (generate(response={"output_candidates": {"top_n": 1}}), "response.output_candidates"),
        (
            generate(response={"output_logprobs": True, "output_candidates": {"top_n": 21}}),
            "response.output_candidates.top_n",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_named_as_the_client_wrote_it(request_: Request, field: str) -> None:
    error = refused(request_)

    assert (error.field, error.reason) == (field, "INVALID_REQUEST")


def is_theirs(path: str) -> bool:
    """Whether their request has a field of that name, list or map entries aside."""
    message: Descriptor | None = vllm_pb2.GenerateRequest.DESCRIPTOR
    for part in path.split("."):
        name = part.partition("[")[0]
        if message is None or name not in {*message.fields_by_name, *message.oneofs_by_name}:
            return False
        field = message.fields_by_name.get(name)
        message = None if field is None else field.message_type
    return True


@settings(max_examples=50, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "model": st.sampled_from(["", "fake", "other"]),
            "temperature": FLOATS,
            "priority": INT32 | SMALL,
            "session_id": st.text(max_size=3),
            "lora_name": st.text(max_size=3),
            "truncate_prompt_tokens": SMALL,
            "sampling": st.fixed_dictionaries(
                {},
                optional={
                    "num_sequences": SMALL,
                    "top_k": UINT32,
                    "top_p": FLOATS,
                    "min_p": FLOATS,
                    "seed": st.integers(-(2**63), 2**63 - 1),
                },
            ),
            "decoding": st.fixed_dictionaries(
                {},
                optional={
                    "presence_penalty": FLOATS,
                    "repetition_penalty": FLOATS,
                    "logit_bias": st.dictionaries(UINT32, FLOATS, max_size=2),
                    "regex": st.text(max_size=3),
                },
            ),
            "stopping": st.fixed_dictionaries(
                {},
                optional={
                    "max_new_tokens": UINT32 | SMALL,
                    "min_new_tokens": UINT32 | SMALL,
                    "stop_token_ids": st.lists(UINT32, max_size=2),
                    "stop_strings": st.lists(st.text(max_size=2), max_size=2),
                },
            ),
            "response": st.fixed_dictionaries(
                {},
                optional={
                    "output_logprobs": st.booleans(),
                    "output_candidates": st.fixed_dictionaries({}, optional={"top_n": UINT32 | SMALL}),
                    "skip_special_tokens": st.booleans(),
                },
            ),
        },
    )
)
def test_any_request_is_taken_or_refused_by_a_field_of_theirs(fields: dict[str, Any]) -> None:
    blamed = "text"
    try:
        with in_their_words(GENERATION):
            validate_generate(read(generate(**fields)).generation)
    except InvalidRequestError as error:
        blamed = error.field

    assert is_theirs(blamed)
