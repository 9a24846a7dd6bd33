"""What the client sends, before anything is sent."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import get_type_hints

import pytest

from gralora.v1 import generation_pb2
from gralora_server.client import ChatMessage, ClientTls, GenerateOptions
from gralora_server.client.connection import Connection
from gralora_server.client.requests import generate_fields

PARTS = (
    generation_pb2.SamplingParams,
    generation_pb2.StoppingParams,
    generation_pb2.ResponseParams,
    generation_pb2.StructuredOutput,
)


def test_every_field_of_the_proto_is_an_option_and_nothing_else() -> None:
    """A field that is added to the proto must reach Python."""
    wire = {field.name for part in PARTS for field in part.DESCRIPTOR.fields}

    assert (
        wire | {"adapter", "adapters", "request_id", "canary_key", "priority", "timeout_s"}
        == get_type_hints(GenerateOptions).keys()
    )


def test_what_is_left_out_or_none_is_not_set() -> None:
    fields = generate_fields("hi", None, None, {"temperature": None, "seed": None, "max_tokens": None, "stop": None})

    assert generation_pb2.GenerateRequest(text="hi") == generation_pb2.GenerateRequest(
        **{name: value for name, value in fields.items() if name not in ("sampling", "stopping", "response")}
    )
    assert generation_pb2.SamplingParams() == fields["sampling"]
    assert generation_pb2.StoppingParams() == fields["stopping"]


@pytest.mark.parametrize("adapters", [{"a": 0.5, "b@3": 1}, [("a", 0.5), ("b@3", 1.0)]])
def test_adapters_are_sent_with_their_weights(adapters) -> None:
    sent = generate_fields("hi", None, None, {"adapters": adapters})["adapters"]

    assert [(one.name, one.weight) for one in sent] == [("a", 0.5), ("b@3", 1.0)]


def test_zero_is_sent_where_it_is_not_the_default() -> None:
    sampling = generate_fields("hi", None, None, {"temperature": 0.0, "seed": 0})["sampling"]

    assert sampling.HasField("temperature")
    assert sampling.HasField("seed")


def test_one_stop_string_need_not_be_a_list() -> None:
    """A string is a sequence of characters, each of which would stop the generation."""
    assert list(generate_fields("hi", None, None, {"stop": "END"})["stopping"].stop) == ["END"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"json_schema": {"type": "null"}}, {"json_schema": '{"type": "null"}'}),
        ({"json_schema": '{"type": "null"}', "regex": None}, {"json_schema": '{"type": "null"}'}),
        ({"regex": "a|b"}, {"regex": "a|b"}),
        ({"grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"choice": ["a", "b"], "json_object": False}, {"choice": generation_pb2.Choices(texts=["a", "b"])}),
        ({"json_object": True}, {"json_object": True}),
    ],
    ids=str,
)
def test_what_an_answer_has_to_match_is_one_option(options, expected) -> None:
    wanted = generate_fields("hi", None, None, options)["structured_output"]

    assert generation_pb2.StructuredOutput(**expected) == wanted


def test_without_such_an_option_nothing_is_sent_and_two_are_refused() -> None:
    """Of a oneof, the one that is set last would win in silence."""
    assert "structured_output" not in generate_fields("hi", None, None, {"regex": None, "json_object": False})
    with pytest.raises(TypeError, match="at most one of choice, regex"):
        generate_fields("hi", None, None, {"regex": "a", "choice": ["a"]})


def test_messages_are_records_or_mappings() -> None:
    turns = [ChatMessage("user", "a"), {"role": "assistant", "content": "b"}]

    messages = generate_fields(None, None, turns, {})["messages"].messages

    assert [(turn.role, turn.content) for turn in messages] == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("prompt", "token_ids", "messages"), [(None, None, None), ("a", [1], None), ("a", None, [])], ids=str
)
def test_exactly_one_prompt_is_wanted(prompt, token_ids, messages) -> None:
    with pytest.raises(TypeError, match="exactly one"):
        generate_fields(prompt, token_ids, messages, {})


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="temprature"):
        generate_fields("hi", None, None, {"temprature": 1})


def test_only_unavailable_is_retried_and_unloading_and_uploading_never() -> None:
    options = dict(Connection(target="x", max_attempts=3).channel_options())
    retried, sent_once = json.loads(options["grpc.service_config"])["methodConfig"]

    assert retried["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    assert retried["retryPolicy"]["maxAttempts"] == 3
    methods = ("UnloadAdapter", "UploadAdapter")
    assert sent_once == {"name": [{"service": "gralora.v1.AdapterService", "method": method} for method in methods]}


def test_the_users_channel_options_win() -> None:
    options = Connection(target="x", options=[("grpc.keepalive_time_ms", 5)]).channel_options()

    assert dict(options)["grpc.keepalive_time_ms"] == 5


def test_the_expected_server_name_can_differ_from_the_address() -> None:
    options = Connection(target="x", tls=ClientTls(server_name="models.example")).channel_options()

    assert dict(options)["grpc.ssl_target_name_override"] == "models.example"


def test_the_client_loads_neither_torch_nor_transformers() -> None:
    """Applications that only talk to a server should not pay for an engine."""
    code = (
        "import sys, gralora_server.client as c; c.Client('localhost:1').close(); "
        "print(sorted({'torch', 'transformers', 'numba', 'numpy'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"
