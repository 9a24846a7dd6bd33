"""What a request of KServe's protocol becomes: each parameter where ours has it, however a client sends it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.kserve import Request, infer

from gralora.v1 import generation_pb2
from gralora_runtime.errors import InvalidRequestError
from gralora_server.kserve.asking import Asked, read_request

EVERYTHING = {
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 7,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": -1,
    "frequency_penalty": 0.75,
    "seed": 2**63 - 1,
    "max_tokens": 9,
    "min_tokens": 2,
    "ignore_eos": True,
    "request_id": "r1",
    "canary_key": "u1",
}
LISTS = {"stop": ["a", "b"], "stop_token_ids": [3, "4"], "logit_bias": {"5": -100, "6": "1.5"}}
HARMLESS = {
    "n": 1, "best_of": "1", "use_beam_search": "false", "early_stopping": False, "length_penalty": 1.0,
    "skip_special_tokens": True, "include_stop_str_in_output": "False", "seed": -1, "top_k": -1, "stop": None,
}  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def read(request: Request) -> Asked:
    return read_request(request, base="fake")


def refused(request: Request) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        read(request)
    return caught.value


def filled() -> generation_pb2.StreamGenerateRequest:
    asked = generation_pb2.StreamGenerateRequest(text="hello", request_id="r1", canary_key="u1")
    asked.sampling.temperature, asked.sampling.top_p, asked.sampling.top_k, asked.sampling.min_p = 0.5, 0.25, 7, 0.125
    asked.sampling.repetition_penalty, asked.sampling.presence_penalty = 1.5, -1
    asked.sampling.frequency_penalty, asked.sampling.seed = 0.75, 2**63 - 1
    asked.stopping.max_tokens, asked.stopping.min_tokens, asked.stopping.ignore_eos = 9, 2, True
    return asked


def test_what_is_not_said_is_as_triton_has_it() -> None:
    asked = read(infer())

    generation = generation_pb2.StreamGenerateRequest(text="hello")
    generation.stopping.max_tokens = 16
    assert asked.generation == generation
    assert (asked.model_name, asked.id, asked.lead, asked.outputs) == ("fake", "", "hello", ("text_output",))
    assert (asked.in_pieces, asked.wants_final, asked.timeout_s) == (False, False, None)


@pytest.mark.parametrize("texts", [False, True], ids=["numbers", "texts"])
@pytest.mark.parametrize("where", ["tensor", "parameter", "parameters"])
def test_every_parameter_arrives_where_ours_has_it(where: str, texts: bool) -> None:
    given = {name: value if isinstance(value, str) or not texts else str(value) for name, value in EVERYTHING.items()}
    if where == "tensor":
        request = infer(sampling=given)
    elif where == "parameter":
        request = infer(parameters={"sampling_parameters": json.dumps(given)})
    else:
        request = infer(parameters=given)

    assert read(request).generation == filled()


def test_lists_and_biases_arrive_too() -> None:
    generation = read(infer(sampling=LISTS)).generation

    assert list(generation.stopping.stop) == ["a", "b"]
    assert list(generation.stopping.stop_token_ids) == [3, 4]
    assert dict(generation.sampling.logit_bias) == {5: -100.0, 6: 1.5}
    assert list(read(infer(parameters={"stop": "x"})).generation.stopping.stop) == ["x"]


@pytest.mark.parametrize("name", ["structured_outputs", "guided_decoding"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"json": {"type": "integer"}}, {"json_schema": '{"type": "integer"}'}),
        ({"json": "{}"}, {"json_schema": "{}"}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"choice": ["a", "b"]}, {"choice": generation_pb2.Choices(texts=["a", "b"])}),
        ({"json_object": True}, {"json_object": True}),
        ({"regex": "a", "json": None, "json_object": False, "whitespace_pattern": None}, {"regex": "a"}),
    ],
)
def test_what_the_answer_has_to_match(name: str, given: dict[str, object], expected: dict[str, object]) -> None:
    wanted = generation_pb2.StructuredOutput(**expected)

    assert read(infer(sampling={name: given})).generation.structured_output == wanted
    assert read(infer(parameters={name: json.dumps(given)})).generation.structured_output == wanted


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, ""),
        ({"regex": "a", "choice": ["b"]}, ""),
        (3, ""),
        ({"regex": 3}, ".regex"),
        ({"regex": "\ud800"}, ".regex"),
        ({"choice": ["a", 3]}, ".choice[1]"),
        ({"structural_tag": "{}"}, ".structural_tag"),
        ({"regex": "a", "whitespace": "x"}, ".whitespace"),
        ({"regex": "a", "disable_any_whitespace": True}, ".disable_any_whitespace"),
    ],
)
def test_what_no_answer_can_match_is_refused(given: object, field: str) -> None:
    assert refused(infer(sampling={"structured_outputs": given})).field == f"structured_outputs{field}"


@pytest.mark.parametrize("depth", range(880, 1000, 2))
def test_a_schema_of_any_depth_is_read_or_refused(depth: int) -> None:
    """The text is put together, since no library writes what none reads."""
    written = '{"structured_outputs": {"json": ' + '{"a": ' * depth + "1" + "}" * (depth + 2)
    request = infer(parameters={"sampling_parameters": written})
    refused_at = "nothing"
    try:
        read(request)
    except InvalidRequestError as error:
        refused_at = error.field
    assert refused_at in ("nothing", "sampling_parameters", "structured_outputs.json")


def test_what_is_so_in_any_case_may_be_said() -> None:
    assert read(infer(sampling=HARMLESS)).generation == read(infer()).generation


def test_a_seed_may_have_all_its_bits_and_null_is_no_limit_of_tokens() -> None:
    generation = read(infer(sampling={"seed": 2**64 - 1, "max_tokens": None})).generation

    assert generation.sampling.seed == 2**64 - 1
    assert not generation.stopping.HasField("max_tokens")


def test_inputs_may_be_parameters_but_a_tensor_goes_before_and_the_object_before_all() -> None:
    only_parameters = infer(None, parameters={"text_input": "p", "stream": True, "return_finish_reason": "true"})
    both = infer(
        stream=False,
        sampling={"temperature": 1},
        parameters={"text_input": "p", "stream": True, "temperature": 2.0, "top_k": 5},
    )

    first, second = read(only_parameters), read(both)
    assert (first.generation.text, first.in_pieces, first.outputs) == ("p", True, ("text_output", "finish_reason"))
    assert (second.generation.text, second.in_pieces) == ("hello", False)
    assert (second.generation.sampling.temperature, second.generation.sampling.top_k) == (1, 5)


@pytest.mark.parametrize(
    ("inputs", "lead"),
    [
        ({}, "hello"),
        ({"exclude_input_in_output": False}, "hello"),
        ({"exclude_input_in_output": True}, ""),
        ({"stream": True}, ""),
        ({"stream": True, "exclude_input_in_output": True}, ""),
    ],
)
def test_the_prompt_leads_as_with_triton(inputs: dict[str, bool], lead: str) -> None:
    assert read(infer(**inputs)).lead == lead


def test_pieces_cannot_begin_with_the_prompt() -> None:
    assert refused(infer(stream=True, exclude_input_in_output=False)).field == "exclude_input_in_output"


def test_outputs_are_those_that_are_named_or_flagged() -> None:
    flagged = read(infer(return_num_output_tokens=True, return_finish_reason=False))
    named = read(infer(outputs=["finish_reason", "num_input_tokens"], return_num_output_tokens=True))

    assert flagged.outputs == ("text_output", "num_output_tokens")
    assert named.outputs == ("finish_reason", "num_input_tokens")


def test_outputs_that_there_are_not_are_refused() -> None:
    shared = infer(outputs=["text_output"])
    shared.outputs[0].parameters["shared_memory_region"].string_param = "region"

    assert refused(infer(outputs=["logprobs"])).field == "outputs"
    assert refused(infer(outputs=["text_output", "text_output"])).field == "outputs"
    assert "shared memory" in refused(shared).problem


@pytest.mark.parametrize(
    ("model", "version", "sampling", "adapter"),
    [
        ("fake", "", {}, ""),
        ("fake", "1", {}, ""),
        ("fake", "", {"lora_name": "poet"}, "poet"),
        ("fake", "", {"lora_name": "poet@3"}, "poet@3"),
        ("fake", "", {"lora_name": None}, ""),
        ("poet", "", {}, "poet"),
        ("poet@3", "", {}, "poet@3"),
        ("poet", "3", {}, "poet@3"),
        ("org/poet@main", "3", {}, "org/poet@main@3"),
        ("poet", "sha256:0123456789ab", {}, "poet@sha256:0123456789ab"),
    ],
)
def test_a_model_is_the_base_model_or_an_adapter(
    model: str, version: str, sampling: dict[str, object], adapter: str
) -> None:
    asked = read(infer(model=model, version=version, sampling=sampling))

    assert (asked.generation.adapter, asked.model_name) == (adapter, model)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (infer(model=""), "model_name"),
        (infer(version="2"), "model_version"),
        (infer(model="poet", sampling={"lora_name": "bard"}), "lora_name"),
        (infer(sampling={"lora_name": 3}), "lora_name"),
        (infer(None), "text_input"),
        (infer(None, parameters={"text_input": 3}), "text_input"),
        (infer(id="two words"), "id"),
        (infer(id="x" * 129), "id"),
        (infer(parameters={"timeout": 0}), "timeout"),
        (infer(parameters={"timeout": "soon"}), "timeout"),
        (infer(parameters={"priority": 1}), "priority"),
        (infer(parameters={"sequence_id": 1}), "sequence_id"),
        (infer(parameters={"triton_enable_empty_final_response": 1}), "triton_enable_empty_final_response"),
        (infer(parameters={"sampling_parameters": "[]"}), "sampling_parameters"),
        (infer(parameters={"sampling_parameters": "{"}), "sampling_parameters"),
        (infer(parameters={"sampling_parameters": "[" * 100_000}), "sampling_parameters"),
        (infer(parameters={"sampling_parameters": " " * (1 << 20) + "{}"}), "sampling_parameters"),
        (infer(parameters={"stream": "maybe"}), "stream"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_named_as_the_client_wrote_it(request_: Request, field: str) -> None:
    assert refused(request_).field == field


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"), ("temperature", True), ("temperature", [1]), ("temperature", 10**400),
        ("max_tokens", 1.5), ("max_tokens", "1.5"), ("max_tokens", 2**31), ("max_tokens", True), ("max_tokens", {}),
        ("top_k", "١"), ("seed", -2), ("seed", 2**64), ("seed", "9" * 30),
        ("stop", 3), ("stop", ["a", 3]), ("stop", "\ud800"), ("stop_token_ids", "3"), ("stop_token_ids", [2**31]),
        ("logit_bias", [1]), ("logit_bias", {"a": 1}), ("logit_bias", {"1": "much"}),
        ("ignore_eos", 1), ("ignore_eos", "yes"), ("canary_key", 3),
        ("n", 2), ("n", "many"), ("use_beam_search", True), ("skip_special_tokens", False),
        ("logprobs", 5), ("guided_decoding", {}), ("text_input", "x"),
    ],
)  # fmt: skip
def test_a_sampling_parameter_that_is_wrong_or_unknown_is_named(name: str, value: object) -> None:
    error = refused(infer(sampling={name: value}))

    assert error.field == name
    assert error.reason == "INVALID_REQUEST"


def test_an_unknown_name_of_any_length_makes_a_short_error() -> None:
    error = refused(infer(sampling={"\ud800" + "é" * 5000: 1}))

    assert len(error.field.encode()) <= 80
    assert len(str(error)) < 300


def test_a_timeout_is_in_microseconds() -> None:
    assert read(infer(parameters={"timeout": 2_500_000})).timeout_s == 2.5


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # the first text takes seconds on a busy machine
@given(sampling=st.dictionaries(st.sampled_from([*EVERYTHING, *LISTS, *HARMLESS, "lora_name", "?"]), JSON, max_size=4))
def test_any_json_is_taken_or_refused_for_a_reason(sampling: dict[str, Any]) -> None:
    blamed = ""
    try:
        read(infer(sampling=sampling)).generation.SerializeToString()
    except InvalidRequestError as error:
        blamed = error.field

    assert blamed in {"", *sampling}
