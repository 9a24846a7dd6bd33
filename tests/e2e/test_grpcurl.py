"""A foreign client that knows nothing of us but reflection."""

from __future__ import annotations

import json
from typing import Any

from support.grpcurl import GRPCURL, grpcurl, objects
from support.leaving import leave_after_a_line

from gralora_server import Client

GENERATION = "gralora.v1.GenerationService"
ADAPTERS = "gralora.v1.AdapterService"


def asked(adapter: str, *, max_tokens: int = 5) -> str:
    stopping: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": True}
    return json.dumps({"text": "hello", "adapter": adapter, "sampling": {"temperature": 0}, "stopping": stopping})


def test_reflection_lists_every_service(tiny_server: str) -> None:
    assert {
        "gralora.v1.GenerationService",
        "gralora.v1.AdapterService",
        "gralora.v1.ServerService",
        "grpc.health.v1.Health",
    } <= set(grpcurl(tiny_server, "list").split())


def test_it_can_generate_stream_and_ask_for_health(tiny_server: str, client: Client) -> None:
    expected = client.generate("hello", adapter="a0", max_tokens=5, temperature=0, ignore_eos=True)
    one = json.loads(grpcurl("-d", asked("a0"), tiny_server, f"{GENERATION}/Generate"))
    streamed = grpcurl("-d", asked("a0"), tiny_server, f"{GENERATION}/StreamGenerate")
    health = json.loads(grpcurl(tiny_server, "grpc.health.v1.Health/Check"))

    assert one["started"]["adapter"] == "a0"
    assert one["finished"]["reason"] == "FINISH_REASON_LENGTH"
    assert one["token_ids"] == list(expected.token_ids)
    assert [token for message in objects(streamed) for token in message.get("token_ids", [])] == one["token_ids"]
    assert health == {"status": "SERVING"}


def test_an_unknown_adapter_is_not_found_with_details(tiny_server: str) -> None:
    error = grpcurl("-d", asked("nobody"), tiny_server, f"{GENERATION}/Generate", expect=69)

    assert "Code: NotFound" in error
    assert "no adapter named 'nobody' is registered" in error
    assert "ADAPTER_NOT_FOUND" in error


def test_an_adapter_is_loaded_and_unloaded(tiny_server: str) -> None:
    named = {"name": "by-grpcurl"}
    loaded = json.loads(grpcurl("-d", json.dumps(named | {"path": "a0"}), tiny_server, f"{ADAPTERS}/LoadAdapter"))
    same, answer = (
        json.loads(grpcurl("-d", asked(name), tiny_server, f"{GENERATION}/Generate")) for name in ("a0", "by-grpcurl")
    )
    grpcurl("-d", json.dumps(named), tiny_server, f"{ADAPTERS}/UnloadAdapter")
    error = grpcurl("-d", asked("by-grpcurl"), tiny_server, f"{GENERATION}/Generate", expect=69)

    assert loaded["adapter"]["name"] == "by-grpcurl"
    assert answer["token_ids"] == same["token_ids"]
    assert "ADAPTER_NOT_FOUND" in error


def test_one_that_is_ended_frees_everything(tiny_server: str, client: Client) -> None:
    """`client` looks whether all is free afterwards."""
    body = asked("a0", max_tokens=400)
    command = [str(GRPCURL), "-plaintext", "-d", body, tiny_server, f"{GENERATION}/StreamGenerate"]

    assert leave_after_a_line(command) == "{\n"
