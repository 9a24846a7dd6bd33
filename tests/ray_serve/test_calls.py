"""Calls through a proxy of Serve to a replica: what a client sees is what it sees of a server of our own."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
from grpc_health.v1 import health_pb2
from support.call_lines import call_lines
from support.fake_engine import finished, token
from support.fake_serve import FakeContext, behind_serve
from support.grpc_harness import ask, ask_once, failure, read_all
from support.kserve import infer, said
from support.tenants import as_, two_tenants

from gralora.v1 import adapters_pb2, generation_pb2, server_pb2
from gralora_runtime.errors import AdapterNotFoundError, QueueFullError
from gralora_server.ray.affinity import wanted
from gralora_server.ray.context import REMAINING_KEY, ReplicaContext
from gralora_server.tenants.settings import Role

Code = grpc.StatusCode


def test_the_hint_is_the_adapter_s_name_and_of_several_the_first_one_s() -> None:
    request = generation_pb2.StreamGenerateRequest
    assert wanted(request(adapter="poet@3")) == "poet"
    assert wanted(request(adapters=[{"name": "bard@2"}, {"name": "poet"}])) == "bard"
    assert wanted(request(adapters=[{"name": "../x"}])) == wanted(request()) == ""


async def test_a_stream_is_deltas_with_started_first_and_finished_last() -> None:
    async with behind_serve() as s:
        call = s.client.generation.StreamGenerate(ask(adapter="poet"))
        first = await call.read()
        for delta in (token(1), token(2), finished(output_tokens=2)):
            s.engine.streams["r1"].put(delta)
        rest = await read_all(call)

        assert await call.code() is Code.OK

    assert first.started.adapter == "poet"
    assert [token_id for message in rest for token_id in message.token_ids] == [1, 2]
    assert rest[-1].HasField("finished")


async def test_a_unary_answer_is_the_whole_generation() -> None:
    async with behind_serve() as s:
        s.engine.script = [token(1), token(2), finished(output_tokens=2)]
        call = s.client.generation.Generate(ask_once())
        answer = await call
        trailers = dict(await call.trailing_metadata())

    assert answer.text == "t1 t2 "
    assert trailers["gralora-replica"] == "the-replica"


async def test_an_error_has_its_code_and_its_details() -> None:
    async with behind_serve() as s:
        s.engine.refusals = [
            AdapterNotFoundError("nobody"),
            AdapterNotFoundError("nobody"),
            QueueFullError("full", 2.0),
        ]
        unary = await failure(s.client.generation.Generate(ask_once()))
        streamed = await failure(read_all(s.client.generation.StreamGenerate(ask())))
        full = await failure(s.client.generation.Generate(ask_once()))

    for failed in (unary, streamed):
        assert failed.code is Code.NOT_FOUND
        assert failed.info.reason == "ADAPTER_NOT_FOUND"
        assert failed.info.metadata["adapter"] == "nobody"
        assert failed.trailers["request_id"] == "serve's own"
        assert failed.trailers["gralora-replica"] == "the-replica"
    assert full.details["RetryInfo"].retry_delay.seconds == 2


async def test_what_came_before_an_error_arrives_and_nothing_else() -> None:
    async with behind_serve() as s:
        s.engine.script = [token(1)]
        call = s.client.generation.StreamGenerate(ask())
        await call.read()
        s.engine.streams["r1"].fail(AdapterNotFoundError("gone"))
        messages: list[object] = []
        failed = await failure(read_all(call, messages))

    assert failed.info.reason == "ADAPTER_NOT_FOUND"
    assert all(message.ByteSize() for message in messages)  # the empty one that carried the status stays at the proxy


async def test_a_client_that_leaves_ends_its_request() -> None:
    async with behind_serve() as s:
        call = s.client.generation.StreamGenerate(ask())
        await call.read()
        call.cancel()
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)

    assert s.engine.aborted == ["r1"]


async def test_a_deadline_of_the_client_is_the_requests() -> None:
    async with behind_serve() as s:
        s.engine.script = [finished()]
        await s.client.generation.Generate(ask_once("with"), timeout=60)
        await s.client.generation.Generate(ask_once("without"))
        (limited, unlimited) = s.engine.requests

    assert 50 < limited.timeout_s < 61  # gRPC rounds what it sends
    assert unlimited.timeout_s is None


async def test_nobody_can_set_another_deadline_than_gRPCs() -> None:
    async with behind_serve() as s:
        s.engine.script = [finished()]
        await s.client.generation.Generate(ask_once(), metadata=((REMAINING_KEY, "0.001"),))

    assert s.engine.requests[0].timeout_s is None


@pytest.mark.parametrize(("hint", "told"), [((), "poet"), ((("multiplexed_model_id", "other"),), "other")])
async def test_the_adapter_is_the_hint_unless_the_client_gives_one_and_what_is_served_is_what_is_asked_for(
    hint: tuple[tuple[str, str], ...], told: str
) -> None:
    async with behind_serve() as s:
        s.engine.script = [finished()]
        await s.client.generation.Generate(ask_once(adapter="poet@2"), metadata=hint)

    assert s.serve.metadata[0]["multiplexed_model_id"] == told
    assert s.engine.requests[0].adapter == "poet@2"


@pytest.mark.parametrize("adapter", ["", "no name at all"])
async def test_what_names_no_adapter_has_no_hint(adapter: str) -> None:
    async with behind_serve() as s:
        s.engine.script = [finished()]
        call = s.client.generation.StreamGenerate(ask(adapter=adapter))
        await asyncio.gather(read_all(call), return_exceptions=True)

    assert "multiplexed_model_id" not in s.serve.metadata[0]


async def test_tokens_are_checked_by_the_replica_and_without_one_nothing_is_served() -> None:
    async with behind_serve(tenancy=two_tenants()) as s:
        s.engine.script = [finished()]
        answer = await s.client.generation.Generate(ask_once(adapter="acme/own"), metadata=as_("acme"))
        refused = await failure(s.client.generation.Generate(ask_once("r2")))
        foreign = await failure(s.client.generation.Generate(ask_once("r3", adapter="bob/x"), metadata=as_("acme")))
        small = await failure(
            s.client.adapters.PinAdapter(adapters_pb2.PinAdapterRequest(name="acme/own"), metadata=as_("acme"))
        )
        healthy = await s.client.health.Check(health_pb2.HealthCheckRequest())

    assert answer.HasField("finished")
    assert (refused.code, foreign.code, small.code) == (Code.UNAUTHENTICATED, Code.NOT_FOUND, Code.PERMISSION_DENIED)
    assert healthy.status == health_pb2.HealthCheckResponse.SERVING
    assert [request.tenant for request in s.engine.requests] == ["acme"]


async def test_each_call_has_its_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gralora_server.calls")
    async with behind_serve() as s:
        s.engine.script = [finished()]
        await s.client.generation.Generate(ask_once(adapter="poet"))
        s.engine.refusals = [AdapterNotFoundError("nobody")]
        await failure(s.client.generation.Generate(ask_once("r2")))

    lines = call_lines(caplog)
    assert [(line["request_id"], line["adapter"], line["code"]) for line in lines] == [
        ("r1", "poet@2", "OK"),
        ("r2", "", "NOT_FOUND"),
    ]


async def test_a_replica_that_dies_is_unavailable_for_what_it_served() -> None:
    async with behind_serve() as s:
        s.serve.is_lost = True
        s.engine.script = [finished()]
        unary = await failure(s.client.generation.Generate(ask_once()))
        streamed = await failure(read_all(s.client.generation.StreamGenerate(ask("r2"))))
        listed = await failure(s.client.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()))

    for failed in (unary, streamed, listed):
        assert failed.code is Code.UNAVAILABLE
        assert failed.info.reason == "REPLICA_LOST"
        assert "RetryInfo" in failed.details
        assert "actor" not in failed.message


async def test_an_error_of_our_own_is_no_lost_replica() -> None:
    async with behind_serve() as s:
        s.engine.refusals = [RuntimeError("a bug")]
        failed = await failure(s.client.generation.Generate(ask_once()))

    assert failed.code is Code.INTERNAL
    assert failed.info.reason == "INTERNAL"


async def test_adapters_the_server_and_kserve_answer_as_ever() -> None:
    async with behind_serve(kserve=True) as s:
        listed = await s.client.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
        load = await s.client.server.GetLoad(server_pb2.GetLoadRequest())
        s.engine.script = [token(1), finished(output_tokens=1)]
        answer = await s.client.kserve.ModelInfer(infer(id="r1"))

    assert [adapter.name for adapter in listed.adapters] == ["poet"]
    assert load.running == 1
    assert answer.id == "r1"
    assert said(answer)["text_output"] == "hellot1 "


async def test_a_watch_ends_with_the_draining() -> None:
    async with behind_serve() as s:
        call = s.client.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest())
        news = await call.read()
        s.parts.gate.begin_drain()
        failed = await failure(read_all(call))

    assert news.synced
    assert failed.info.reason == "DRAINING"


def test_what_remains_of_a_deadline_gets_less() -> None:
    now_s = 100.0
    context = ReplicaContext(FakeContext(((REMAINING_KEY, "2.500"),)), now_s=lambda: now_s)
    before_s, now_s = context.time_remaining(), 102.0
    later_s, now_s = context.time_remaining(), 110.0

    assert (before_s, later_s, context.time_remaining()) == (2.5, 0.5, 0.0)
    assert ReplicaContext(FakeContext()).time_remaining() is None


async def test_a_manager_may_change_its_own() -> None:
    async with behind_serve(tenancy=two_tenants()) as s:
        s.engine.adapters.infos["acme/own"] = s.engine.adapters.infos["poet"]
        request = adapters_pb2.PinAdapterRequest(name="acme/own", pinned=True)
        answer = await s.client.adapters.PinAdapter(request, metadata=as_("acme", Role.MANAGE))

    assert answer.adapter.pinned
