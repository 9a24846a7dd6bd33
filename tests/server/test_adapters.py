"""AdapterService over a real socket."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.fake_engine import adapter_info
from support.grpc_harness import failure, served

from gralora.v1 import adapters_pb2
from gralora_runtime.errors import AdapterBusyError, AdapterRejectedError, AdapterVersionLostError

Code = grpc.StatusCode


async def test_adapters_are_listed_by_name() -> None:
    async with served() as s:
        s.engine.adapters.infos["bard"] = adapter_info("bard")
        answer = await s.client.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())

    assert [adapter.name for adapter in answer.adapters] == ["bard", "poet"]
    assert {adapter.state for adapter in answer.adapters} == {adapters_pb2.ADAPTER_STATE_RESIDENT}


async def test_a_list_comes_in_pages_of_what_was_asked_for() -> None:
    async with served() as s:
        s.engine.adapters.infos |= {name: adapter_info(name) for name in ("bard", "basso", "poem")}
        found, token = [], ""
        while True:
            request = adapters_pb2.ListAdaptersRequest(page_size=1, page_token=token, prefix="b")
            answer = await s.client.adapters.ListAdapters(request)
            found += [adapter.name for adapter in answer.adapters]
            assert answer.total_size == 2
            if not (token := answer.next_page_token):
                break

    assert found == ["bard", "basso"]


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("page_size", {"page_size": 1001}),
        ("page_size", {"page_size": -1}),
        ("page_token", {"page_token": "x" * 513}),
        ("prefix", {"prefix": "x" * 513}),
        ("states", {"states": [adapters_pb2.ADAPTER_STATE_UNSPECIFIED]}),
        ("states", {"states": [99]}),
        ("states", {"states": [adapters_pb2.ADAPTER_STATE_HOST] * 17}),
    ],
)
async def test_a_list_that_makes_no_sense_is_refused(field: str, wrong: dict[str, Any]) -> None:
    async with served() as s:
        failed = await failure(s.client.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest(**wrong)))

    assert failed.code is Code.INVALID_ARGUMENT
    assert failed.fields == [field]


async def test_promotions_rollbacks_and_canaries_reach_the_catalogue() -> None:
    async with served() as s:
        stub = s.client.adapters
        await stub.PromoteAdapter(adapters_pb2.PromoteAdapterRequest(name="poet", version="3"))
        await stub.RollbackAdapter(adapters_pb2.RollbackAdapterRequest(name="poet"))
        request = adapters_pb2.SetAdapterCanaryRequest(name="poet", version="3", share=0.25)
        answer = await stub.SetAdapterCanary(request)

    assert s.engine.adapters.calls == [
        ("promote", "poet", "3"),
        ("roll_back", "poet"),
        ("set_canary", "poet", "3", 0.25),
    ]
    described = answer.adapter
    assert (described.version, described.previous_version, described.follows) == (2, 1, True)
    assert (described.canary_version, described.canary_share) == (3, 0.25)
    assert [version.number for version in described.versions] == [1, 2, 3]
    assert [version.HasField("last_used") for version in described.versions] == [True, True, False]


@pytest.mark.parametrize("version", ["x" * 81])
async def test_a_version_is_not_longer_than_a_digest(version: str) -> None:
    async with served() as s:
        request = adapters_pb2.PromoteAdapterRequest(name="poet", version=version)
        failed = await failure(s.client.adapters.PromoteAdapter(request))

    assert failed.fields == ["version"]


async def test_a_watch_tells_what_there_is_and_then_what_changes() -> None:
    async with served() as s:
        adapters = s.engine.adapters
        adapters.infos |= {name: adapter_info(name) for name in ("bard", "other")}
        call = s.client.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest(prefix="b"))
        first = await call.read()
        adapters.infos["basso"] = adapter_info("basso")
        adapters.changes.touch("basso")
        adapters.changes.touch("other")
        second = await call.read()
        del adapters.infos["bard"]
        adapters.changes.touch("bard")
        third = await call.read()
        call.cancel()

    assert ([one.name for one in first.adapters], first.synced) == (["bard"], True)
    assert [one.name for one in second.adapters] == ["basso"]
    assert (list(third.adapters), list(third.removed)) == ([], ["bard"])


async def test_a_watch_of_thousands_comes_in_messages_that_a_client_takes() -> None:
    async with served() as s:
        s.engine.adapters.infos |= {f"n{i:04}": adapter_info(f"n{i:04}") for i in range(1000)}
        call = s.client.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest())
        told: list[str] = []
        while True:
            message = await call.read()
            told += [one.name for one in message.adapters]
            if message.synced:
                break
        call.cancel()

    assert sorted(s.engine.adapters.infos) == told


async def test_a_watch_ends_when_the_server_drains() -> None:
    async with served() as s:
        call = s.client.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest())
        await call.read()
        drained = asyncio.create_task(s.server.drain(60.0))
        failed = await failure(call.read())
        await drained

    assert failed.code is Code.UNAVAILABLE
    assert failed.info.reason == "DRAINING"


async def test_one_adapter_is_described() -> None:
    async with served() as s:
        answer = await s.client.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="poet"))

    assert answer.adapter.name == "poet"
    assert answer.adapter.digest == "a" * 64


@pytest.mark.parametrize("method", ["GetAdapter", "UnloadAdapter", "PinAdapter"])
async def test_an_unknown_adapter_is_not_found(method: str) -> None:
    async with served() as s:
        request = getattr(adapters_pb2, f"{method}Request")(name="ghost")
        failed = await failure(getattr(s.client.adapters, method)(request))

    assert failed.code is Code.NOT_FOUND
    assert failed.message == "no adapter named 'ghost' is registered"
    assert failed.info.reason == "ADAPTER_NOT_FOUND"
    assert failed.details["ResourceInfo"].resource_type == "gralora.v1.Adapter"
    assert failed.details["ResourceInfo"].resource_name == "ghost"


@pytest.mark.parametrize("method", ["GetAdapter", "UnloadAdapter", "PinAdapter", "LoadAdapter"])
async def test_an_adapter_without_a_name_is_invalid(method: str) -> None:
    async with served() as s:
        request = getattr(adapters_pb2, f"{method}Request")()
        failed = await failure(getattr(s.client.adapters, method)(request))

    assert failed.code is Code.INVALID_ARGUMENT
    assert failed.fields == ["name"]
    assert s.engine.adapters.calls == []


async def test_loading_passes_name_path_and_pin() -> None:
    async with served() as s:
        request = adapters_pb2.LoadAdapterRequest(name="bard", path="sub/bard", pin=True)
        answer = await s.client.adapters.LoadAdapter(request)
        await s.client.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="bard"))

    assert answer.adapter.name == "bard"
    assert answer.adapter.pinned
    assert s.engine.adapters.calls == [("load", "bard", Path("sub/bard"), True), ("load", "bard", None, False)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AdapterVersionLostError("bard", 3, "its files are gone"), Code.FAILED_PRECONDITION),
        (
            AdapterRejectedError("bard", ["it uses DoRA", "rank 3 is not divisible by 2 blocks"]),
            Code.FAILED_PRECONDITION,
        ),
    ],
    ids=["lost", "rejected"],
)
@pytest.mark.parametrize("when", ["at once", "later"])
async def test_a_load_that_fails_says_why(error: Exception, code: grpc.StatusCode, when: str) -> None:
    async with served() as s:
        if when == "at once":
            s.engine.adapters.error = error
        else:
            s.engine.adapters.loading = concurrent.futures.Future()
            s.engine.adapters.loading.set_exception(error)
        failed = await failure(s.client.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="bard")))

    assert failed.code is code
    assert failed.message == str(error)
    assert failed.details["ResourceInfo"].resource_name == "bard"


async def test_a_client_that_leaves_does_not_cancel_a_load_that_others_wait_for(caplog, monkeypatch) -> None:
    left = asyncio.Event()
    caplog.set_level(logging.INFO, logger="gralora_server.calls")
    monkeypatch.setattr(caplog.handler, "emit", lambda record: "CANCELLED" in record.getMessage() and left.set())
    async with served() as s:
        s.engine.adapters.loading = concurrent.futures.Future()
        request = adapters_pb2.LoadAdapterRequest(name="bard")
        hasty = s.client.adapters.LoadAdapter(request)
        patient = s.client.adapters.LoadAdapter(request)
        for _ in range(2):
            assert await asyncio.to_thread(s.engine.adapters.called.acquire, timeout=10)
        hasty.cancel()
        await asyncio.wait_for(left.wait(), 10)
        s.engine.adapters.loading.set_result(adapter_info("bard"))
        answer = await patient

    assert answer.adapter.name == "bard"


async def test_unloading_says_what_it_freed() -> None:
    async with served() as s:
        answer = await s.client.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="poet"))

    assert (answer.name, answer.digest) == ("poet", "a" * 64)
    assert (answer.pool_bytes_freed, answer.host_bytes_freed) == (1000, 2000)


async def test_a_busy_adapter_stays() -> None:
    async with served() as s:
        s.engine.adapters.error = AdapterBusyError("poet", 3)
        failed = await failure(s.client.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="poet")))

    assert failed.code is Code.FAILED_PRECONDITION
    assert failed.info.reason == "ADAPTER_BUSY"


@pytest.mark.parametrize("pinned", [True, False])
async def test_pinning_and_unpinning(pinned: bool) -> None:
    async with served() as s:
        answer = await s.client.adapters.PinAdapter(adapters_pb2.PinAdapterRequest(name="poet", pinned=pinned))

    assert answer.adapter.pinned is pinned
    assert s.engine.adapters.calls == [("pin", "poet", pinned)]
