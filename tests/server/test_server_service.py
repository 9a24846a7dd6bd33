"""ServerService, reflection and stock clients, over a real socket."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path

import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.fake_engine import LOAD, finished, token
from support.grpc_harness import Served, ask, failure, served

from gralora.v1 import generation_pb2, server_pb2

GRPCURL = shutil.which("grpcurl", path=str(Path(sys.executable).parent)) or shutil.which("grpcurl")


async def test_info_says_what_is_served() -> None:
    async with served() as s:
        info = await s.client.server.GetServerInfo(server_pb2.GetServerInfoRequest())

    assert (info.api_version, info.model, info.max_model_len) == ("gralora.v1", "fake", 2048)


async def test_load_adds_up() -> None:
    async with served() as s:
        load = await s.client.server.GetLoad(server_pb2.GetLoadRequest())

    assert load.pages_total == load.pages_free + load.pages_cached + load.pages_leased
    assert load.generated_tokens == LOAD.generated_tokens


async def test_tokenize_takes_text_and_messages() -> None:
    messages = generation_pb2.ChatMessages(messages=[generation_pb2.ChatMessage(role="user", content="a b")])
    async with served() as s:
        text = await s.client.server.Tokenize(server_pb2.TokenizeRequest(text="one two three"))
        chat = await s.client.server.Tokenize(server_pb2.TokenizeRequest(messages=messages))
        nothing = await failure(s.client.server.Tokenize(server_pb2.TokenizeRequest()))

    assert list(text.token_ids) == [0, 1, 2]
    assert text.max_model_len == 2048
    assert list(chat.token_ids) == [0, 1]
    assert nothing.fields == ["prompt"]


async def test_abort_ends_the_request_of_that_id() -> None:
    async with served() as s:
        call = s.client.generation.StreamGenerate(ask())
        await call.read()
        known = await s.client.server.AbortRequest(server_pb2.AbortRequestRequest(request_id="r1"))
        unknown = await s.client.server.AbortRequest(server_pb2.AbortRequestRequest(request_id="r2"))
        call.cancel()

    assert s.engine.aborted[0] == "r1"
    assert (known.aborted, unknown.aborted) == (True, False)


async def test_reflection_lists_every_service() -> None:
    async with served() as s:
        stub = reflection_pb2_grpc.ServerReflectionStub(s.client.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()
        call.cancel()

    assert {service.name for service in answer.list_services_response.service} == {
        "gralora.v1.GenerationService",
        "gralora.v1.AdapterService",
        "gralora.v1.ServerService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_reflection_can_be_off() -> None:
    async with served(reflection=False) as s:
        stub = reflection_pb2_grpc.ServerReflectionStub(s.client.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        failed = await failure(call.read())

    assert failed.code.name == "UNIMPLEMENTED"


@pytest.mark.skipif(GRPCURL is None, reason="grpcurl is not installed")
async def test_a_client_that_knows_no_proto_can_generate() -> None:
    async with served() as s:
        s.engine.script = [token(1), finished(output_tokens=1)]
        request = {"requestId": "r1", "text": "hello", "sampling": {"temperature": 0}}
        code, out, _ = await grpcurl(s, "-d", json.dumps(request), "gralora.v1.GenerationService/StreamGenerate")

    assert code == 0
    assert '"text": "t1 "' in out
    assert '"reason": "FINISH_REASON_LENGTH"' in out
    assert s.engine.requests[0].sampling.temperature == 0


@pytest.mark.skipif(GRPCURL is None, reason="grpcurl is not installed")
async def test_a_client_that_knows_no_proto_sees_why_it_failed() -> None:
    async with served() as s:
        code, _, err = await grpcurl(s, "-d", '{"text": ""}', "gralora.v1.GenerationService/Generate")

    assert code != 0
    assert "Code: InvalidArgument" in err
    assert "text: must not be empty" in err


async def grpcurl(s: Served, *arguments: str) -> tuple[int, str, str]:
    flags, method = arguments[:-1], arguments[-1]
    process = await asyncio.create_subprocess_exec(
        *(GRPCURL, "-plaintext", *flags, f"127.0.0.1:{s.port}", method),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()
