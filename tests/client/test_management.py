"""Adapters, the server itself, and readiness."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.both_clients import Connect, call, connect_async, connect_sync
from support.fake_engine import INFO, LOAD, FakeEngine, activity, adapter_info, request_activity
from support.grpc_harness import served

from gralora_runtime.observation.requests import RequestObservation
from gralora_runtime.observation.usage import Tally
from gralora_server.client import (
    AdapterState,
    AsyncClient,
    DeadlineError,
    TenantUsage,
    TokenizeResult,
    UnloadResult,
    requests,
)
from gralora_server.tenants.request_ids import scoped
from gralora_server.tenants.usage import Counts

both = pytest.mark.parametrize("connect", [connect_sync, connect_async], ids=["sync", "async"])


@both
async def test_an_adapter_arrives_with_everything_the_server_says(connect: Connect) -> None:
    async with served() as s, connect(s.port) as client:
        (listed,) = await call(client, "adapters.list")
        got = await call(client, "adapters.get", "poet")

    assert got == listed
    assert (listed.name, listed.state, listed.kind) == ("poet", AdapterState.RESIDENT, "gralora")
    assert (listed.rank, listed.k, listed.hybrid_rank, listed.equivalent_rank) == (8, 2, 4, 20)
    assert (listed.pool_bytes, listed.in_flight, listed.num_modules, listed.scale) == (1200, 2, 90, 1.5)
    assert listed.last_used == datetime.fromtimestamp(1_700_000_000.5, UTC)


@both
async def test_adapters_are_loaded_pinned_and_unloaded(connect: Connect) -> None:
    async with served() as s, connect(s.port) as client:
        loaded = await call(client, "adapters.load", "poet", pin=True)
        await call(client, "adapters.load", "poet", Path("below/poet"))
        pinned = await call(client, "adapters.pin", "poet")
        unpinned = await call(client, "adapters.pin", "poet", pinned=False)
        freed = await call(client, "adapters.unload", "poet")

    assert (loaded.pinned, pinned.pinned, unpinned.pinned) == (True, True, False)
    assert freed == UnloadResult(name="poet", digest="a" * 64, pool_bytes_freed=1000, host_bytes_freed=2000)
    assert s.engine.adapters.calls == [
        ("load", "poet", None, True),
        ("load", "poet", Path("below/poet"), False),
        ("pin", "poet", True),
        ("pin", "poet", False),
        ("unload", "poet"),
    ]


@both
async def test_a_list_is_read_to_its_last_page(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "PAGE_SIZE", 2)
    async with served() as s, connect(s.port) as client:
        s.engine.adapters.infos |= {name: adapter_info(name) for name in ("a1", "a2", "a3", "a4", "a5", "b")}
        listed = await call(client, "adapters.list", "a", states=[AdapterState.RESIDENT])

    assert [adapter.name for adapter in listed] == ["a1", "a2", "a3", "a4", "a5"]


@both
async def test_usage_is_read_to_its_last_page(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "PAGE_SIZE", 2)
    async with served() as s, connect(s.port) as client:
        for tenant in ("", "acme"):
            for adapter in ("", "poet", "org/bard@main"):
                s.server.usage.add(tenant, adapter, Counts(1, 2, 3, 4, 5, 6))
        everybody = await call(client, "usage")
        one = await call(client, "usage", "acme")
        operator = await call(client, "usage", "")

    assert [(row.tenant, row.adapter) for row in everybody] == [
        (tenant, adapter) for tenant in ("", "acme") for adapter in ("", "org/bard@main", "poet")
    ]
    assert (operator, one) == (everybody[:3], everybody[3:])
    assert one[2] == TenantUsage(
        tenant="acme",
        adapter="poet",
        requests=1,
        prompt_tokens=2,
        cached_tokens=3,
        output_tokens=4,
        refused=5,
        upload_bytes=6,
    )


@both
async def test_versions_are_promoted_rolled_back_and_tried(connect: Connect) -> None:
    async with served() as s, connect(s.port) as client:
        promoted = await call(client, "adapters.promote", "poet", "3")
        await call(client, "adapters.promote", "poet")
        await call(client, "adapters.rollback", "poet")
        await call(client, "adapters.set_canary", "poet", "3", 0.25)

    assert s.engine.adapters.calls == [
        ("promote", "poet", "3"),
        ("promote", "poet", ""),
        ("roll_back", "poet"),
        ("set_canary", "poet", "3", 0.25),
    ]
    assert (promoted.version, promoted.previous_version, promoted.follows) == (2, 1, True)
    assert (promoted.canary_version, promoted.canary_share) == (3, 0.25)
    assert [(version.number, version.last_used is None) for version in promoted.versions] == [
        (1, False),
        (2, False),
        (3, True),
    ]
    assert promoted.warnings == promoted.versions[1].warnings == ("it is odd",)


async def test_a_watch_is_iterated_over() -> None:
    async with served() as s, AsyncClient(f"127.0.0.1:{s.port}") as client:
        news = client.adapters.watch()
        first = await anext(news)
        s.engine.adapters.infos.pop("poet")
        s.engine.adapters.changes.touch("poet")
        second = await anext(news)
        await news.aclose()

    assert ([adapter.name for adapter in first.adapters], first.synced) == (["poet"], True)
    assert second.removed == ("poet",)


@both
async def test_the_server_describes_itself(connect: Connect) -> None:
    async with served() as s, connect(s.port) as client:
        info, load = await call(client, "info"), await call(client, "load")

    assert info.api_version == "gralora.v1"
    assert {name: getattr(info, name) for name in INFO.__slots__} == {n: getattr(INFO, n) for n in INFO.__slots__}
    assert load == LOAD


@both
async def test_tokenize_and_abort(connect: Connect) -> None:
    async with served() as s, connect(s.port) as client:
        of_text = await call(client, "tokenize", "three short words")
        of_messages = await call(client, "tokenize", messages=[{"role": "user", "content": "two words"}])
        aborted = await call(client, "abort", "nobody")

    assert of_text == TokenizeResult((0, 1, 2), 2048)
    assert of_messages.token_ids == (0, 1)
    assert aborted is False


@both
async def test_wait_ready_returns_once_the_server_takes_requests(connect: Connect) -> None:
    async with served(started=False) as s, connect(s.port) as client:
        waiting = asyncio.create_task(call(client, "wait_ready", 10.0))
        with pytest.raises(DeadlineError, match="starting"):
            await call(client, "wait_ready", 0.2)
        assert not waiting.done()
        await s.server.open(s.engine)

        await waiting


@both
async def test_wait_ready_gives_up_when_nobody_listens(connect: Connect) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        async with connect(reserved.getsockname()[1]) as client:
            with pytest.raises(DeadlineError, match=r"not ready within 0\.2 s"):
                await call(client, "wait_ready", 0.2)


@both
async def test_activity_arrives_as_the_engine_tells_it_but_for_names_that_are_the_servers_own(connect: Connect) -> None:
    engine = FakeEngine()
    observed = RequestObservation(10)
    observed.first_token.observe(0.3)
    expected = activity(observed, adapters={"poet@2": Tally(1, 2, 3)})
    engine.activity = lambda: expected
    engine.under_way = lambda: [request_activity(scoped("acme", "r1")), request_activity("r2", tenant="adapter:poet")]
    async with served(engine=engine) as s, connect(s.port) as client:
        found = await call(client, "activity")

    assert replace(found.activity, adapters=expected.adapters) == expected
    assert {account: asdict(tally) for account, tally in found.activity.adapters.items()} == {
        "poet@2": {"requests": 1, "prompt_tokens": 2, "generated_tokens": 3}
    }
    assert found.requests == (request_activity("r1"), request_activity("r2", tenant=""))
