"""Who is told where a request's time went, and what of others they hear."""

from __future__ import annotations

import asyncio
from pathlib import Path

from support.fake_engine import FakeEngine
from support.grpc_harness import Served, ask, read_all, served
from support.http_harness import error_of, http_served
from support.tenants import OPERATOR, as_, bearing, two_tenants
from support.workspaces import save_workspace

from gralora.v1 import server_pb2
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig
from gralora_runtime.observation.holdups import Hold
from gralora_runtime.observation.timeline import GivenWay, Line, Mark, Stage, Timeline
from gralora_server.client import AsyncClient
from gralora_server.tenants.request_ids import scoped

ASKED = server_pb2.ExplainRequestRequest(request_id="r1")
HELD = {Hold.PLACE: 0.0, Hold.PAGES: 0.0, Hold.TURN: 0.0}


def waited(tenant: str, behind: str) -> Timeline:
    """A second, for a place that another tenant had."""
    found = Timeline(request_id=scoped(tenant, "r1"), tenant=tenant, received_s=10.0, outcome="length", ended_s=11.0)
    line = Line(HELD | {Hold.PLACE: 1.0}, 3, 0)
    found.marks += [
        Mark(Stage.QUEUE, 10.0, line=Line(HELD, 0, 0), given_way=GivenWay(Hold.PLACE, behind)),
        Mark(Stage.PREFILL, 11.0, line=line),
        Mark(Stage.DELIVERY, 11.0),
    ]
    return found


async def explained(s: Served, metadata: tuple[tuple[str, str], ...]) -> server_pb2.RequestExplanation | None:
    answer = await s.client.server.ExplainRequest(ASKED, metadata=metadata)
    return answer.explanation if answer.HasField("explanation") else None


async def test_a_tenant_is_told_of_its_own_requests_alone_and_not_who_others_are() -> None:
    engine = FakeEngine()
    engine.timelines.keep(waited("acme", behind="bob"))
    async with served(tenancy=two_tenants(), engine=engine) as s:
        by_acme = await explained(s, as_("acme"))
        by_bob = await explained(s, as_("bob"))
        by_operator = await explained(s, bearing(OPERATOR))

    assert by_bob is None
    assert by_acme is not None
    assert by_operator is not None
    assert (by_acme.cause, by_acme.request_id, by_acme.parts[0].lacks_for) == ("flood", "r1", "another tenant")
    assert "bob" not in str(by_acme)
    assert by_operator.parts[0].lacks_for == "bob"
    assert "requests of bob" in by_operator.says


async def test_the_parts_and_both_sentences_reach_the_client() -> None:
    engine = FakeEngine()
    engine.timelines.keep(waited("", behind="bob"))
    async with served(engine=engine) as s, AsyncClient(f"127.0.0.1:{s.port}") as client:
        found = await client.explain("r1")
        unknown = await client.explain("r2")

    assert unknown is None
    assert found is not None
    assert [(part.stage, part.duration_s) for part in found.parts] == [("queue", 1.0), ("prefill", 0), ("delivery", 0)]
    assert [(one.by, one.duration_s) for one in found.parts[0].held_up] == [("place", 1.0)]
    assert (found.total_s, found.outcome, found.first_token_s) == (1.0, "length", None)
    assert found.says.startswith("1.00 s of 1.00 s went to waiting behind requests of bob")


async def test_a_client_that_does_not_read_is_the_cause_of_what_that_takes(tmp_path: Path) -> None:
    """A real engine behind a real port: its answer waits for the client, whose window is full."""
    workspace = save_workspace(tmp_path, {})
    config = EngineConfig(model=workspace / "model", device="cpu", num_threads=1, kv_cache_bytes=8 << 20)
    engine = await AsyncEngine.start(config)
    try:
        async with served(engine=engine, channel_options=(("grpc.http2.bdp_probe", 0),)) as s:
            wanted = ask("r1", stopping={"max_tokens": 480, "ignore_eos": True}, response={"top_logprobs": 20})
            wanted.response.logprobs = True
            call = s.client.generation.StreamGenerate(wanted)
            await call.read()
            await asyncio.sleep(2.0)
            await read_all(call)
            async with AsyncClient(f"127.0.0.1:{s.port}") as client:
                found = await client.explain("r1")
    finally:
        await engine.close()

    assert found is not None
    assert found.cause == "slow_reader"
    assert found.total_s > 2.0
    assert "its client" in found.says


async def test_http_tells_the_same_and_knows_what_it_does_not_know() -> None:
    engine = FakeEngine()
    engine.timelines.keep(waited("", behind="bob"))
    async with http_served(engine=engine) as s:
        found = (await s.client.get("/v1/requests/r1/explanation")).json()
        unknown = await s.client.get("/v1/requests/r2/explanation")

    assert (found["cause"], found["total_s"]) == ("flood", 1.0)
    assert found["parts"][0]["stage"] == "queue"
    assert unknown.status_code == 404
    assert error_of(unknown)["code"] == "REQUEST_NOT_FOUND"
