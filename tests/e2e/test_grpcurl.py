"""A foreign client that knows nothing of us but reflection."""

from __future__ import annotations

import json

from support.grpcurl import grpcurl


def test_reflection_lists_every_service(tiny_server: str) -> None:
    assert {
        "gralora.v1.GenerationService",
        "gralora.v1.AdapterService",
        "gralora.v1.ServerService",
        "grpc.health.v1.Health",
    } <= set(grpcurl(tiny_server, "list").split())


def test_it_can_generate_stream_and_ask_for_health(tiny_server: str) -> None:
    body = json.dumps({"text": "hello", "adapter": "a0", "sampling": {"temperature": 0}, "stopping": {"max_tokens": 5}})
    one = json.loads(grpcurl("-d", body, tiny_server, "gralora.v1.GenerationService/Generate"))
    streamed = grpcurl("-d", body, tiny_server, "gralora.v1.GenerationService/StreamGenerate")
    health = json.loads(grpcurl(tiny_server, "grpc.health.v1.Health/Check"))

    assert one["started"]["adapter"] == "a0"
    assert one["finished"]["reason"] in ("FINISH_REASON_LENGTH", "FINISH_REASON_STOP")
    assert '"finished"' in streamed
    assert health == {"status": "SERVING"}


def test_an_unknown_adapter_is_not_found_with_details(tiny_server: str) -> None:
    error = grpcurl(
        "-d", '{"text": "x", "adapter": "nobody"}', tiny_server, "gralora.v1.GenerationService/Generate", expect=69
    )

    assert "Code: NotFound" in error
    assert "no adapter named 'nobody' is registered" in error
    assert "ADAPTER_NOT_FOUND" in error
