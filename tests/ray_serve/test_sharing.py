"""Two replicas with engines that are fakes: what one is asked both do, by their own servicers, as the same caller."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from support.fake_engine import FakeEngine, adapter_info
from support.fake_serve import proxied
from support.grpc_harness import Client, ask, failure
from support.tenants import OPERATOR, as_, bearing, two_tenants

from gralora.v1 import adapters_pb2, server_pb2
from gralora_runtime.errors import AdapterBusyError, AdapterCapacityError
from gralora_server.config import ServerConfig
from gralora_server.parts import Parts
from gralora_server.ray.answering import Answering
from gralora_server.ray.changes import Changes
from gralora_server.ray.sharing import Sharing
from gralora_server.settings.layers import Layers
from gralora_server.settings.reloader import Reloader
from gralora_server.tenants.settings import Role

Code = grpc.StatusCode
REPLICA = "replica"  # in a call's metadata: which one a test wants


@dataclass(frozen=True, slots=True)
class Replica:
    parts: Parts
    engine: FakeEngine
    sharing: Sharing

    @property
    def calls(self) -> list[tuple[object, ...]]:
        return self.engine.adapters.calls


@dataclass(frozen=True, slots=True)
class Pair:
    log: Changes
    a: Replica
    b: Replica
    client: Client


@asynccontextmanager
async def replica(name: str, log: Changes, **settings: object) -> AsyncIterator[Replica]:
    reloader = settings.pop("reloader", None)
    sharing = Sharing(name, log)
    parts = Parts(
        ServerConfig(**settings), reloader() if reloader else None, adapters=sharing.adapters, about=sharing.about
    )
    engine = FakeEngine()
    await parts.open(engine)
    async with sharing.follower.following():
        yield Replica(parts, engine, sharing)


@asynccontextmanager
async def pair(**settings: object) -> AsyncIterator[Pair]:
    """Calls go to a, unless their metadata want b."""
    log = Changes()
    async with AsyncExitStack() as stack:
        there = {name: await stack.enter_async_context(replica(name, log, **dict(settings))) for name in "ab"}
        ways = {name: Answering(one.parts, name) for name, one in there.items()}
        _, client = await stack.enter_async_context(proxied(lambda metadata: ways[metadata.get(REPLICA, "a")]))
        yield Pair(log, there["a"], there["b"], client)


CHANGES = {
    "load": (adapters_pb2.LoadAdapterRequest(name="poet", pin=True), ("load", "poet", None, True)),
    "load from a path": (
        adapters_pb2.LoadAdapterRequest(name="poet", path="/srv/poet"),
        ("load", "poet", Path("/srv/poet"), False),
    ),
    "unload": (adapters_pb2.UnloadAdapterRequest(name="poet"), ("unload", "poet")),
    "pin": (adapters_pb2.PinAdapterRequest(name="poet", pinned=True), ("pin", "poet", True)),
    "roll back": (adapters_pb2.RollbackAdapterRequest(name="poet"), ("roll_back", "poet")),
    "promote": (
        adapters_pb2.PromoteAdapterRequest(name="poet", version="sha256:" + "2" * 12),
        ("promote", "poet", "sha256:" + "2" * 12),
    ),
    "canary": (
        adapters_pb2.SetAdapterCanaryRequest(name="poet", version="3", share=0.5),
        ("set_canary", "poet", "sha256:" + "3" * 64, 0.5),
    ),
    "promote a number": (
        adapters_pb2.PromoteAdapterRequest(name="poet", version="2"),
        ("promote", "poet", "sha256:" + "2" * 64),
    ),
    "promote the newest": (adapters_pb2.PromoteAdapterRequest(name="poet"), ("promote", "poet", "sha256:" + "3" * 64)),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_is_made_by_both(change: str) -> None:
    request, call = CHANGES[change]
    method = type(request).__name__.removesuffix("Request")
    async with pair() as s:
        await getattr(s.client.adapters, method)(request, metadata=((REPLICA, "b"),))

    assert s.a.calls == s.b.calls == [call]


async def test_a_number_of_a_version_goes_on_as_its_content() -> None:
    async with pair() as s:
        request = adapters_pb2.PinAdapterRequest(name="poet@2", pinned=True)
        failed = await failure(s.client.adapters.PinAdapter(request))

    assert failed.code is Code.NOT_FOUND  # the fake knows adapters by their names alone
    assert s.a.calls == s.b.calls == [("pin", f"poet@sha256:{'2' * 64}", True)]


async def test_what_both_refuse_is_refused_as_ever() -> None:
    async with pair() as s:
        for one in (s.a, s.b):
            one.engine.adapters.error = AdapterCapacityError("poet", 2, 1)
        failed = await failure(s.client.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="poet")))

    assert failed.info.reason == "ADAPTER_CAPACITY"


async def test_what_one_refuses_is_told_and_can_be_mended() -> None:
    async with pair() as s:
        s.b.engine.adapters.error = AdapterBusyError("poet", 1)
        failed = await failure(s.client.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="poet")))
        s.b.engine.adapters.error = None
        answer = await s.client.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="poet"))

    assert (failed.code, failed.info.reason) == (Code.UNAVAILABLE, "REPLICAS_DIFFER")
    assert "b: " in failed.message
    assert answer.name == "poet"


async def test_rights_are_the_callers_at_every_replica() -> None:
    async with pair(tenancy=two_tenants()) as s:
        for one in (s.a, s.b):
            one.engine.adapters.infos["acme/own"] = adapter_info("acme/own")
        pin = adapters_pb2.PinAdapterRequest(name="acme/own", pinned=True)
        await s.client.adapters.PinAdapter(pin, metadata=as_("acme", Role.MANAGE))
        foreign = await failure(s.client.adapters.PinAdapter(pin, metadata=as_("bob", Role.MANAGE)))
        load = adapters_pb2.LoadAdapterRequest(name="acme/own", path="/etc")
        path = await failure(s.client.adapters.LoadAdapter(load, metadata=as_("acme", Role.MANAGE)))

    assert s.a.calls == s.b.calls == [("pin", "acme/own", True)]
    assert foreign.code is Code.NOT_FOUND
    assert path.code is Code.PERMISSION_DENIED


async def test_a_replica_that_starts_later_has_what_the_others_were_told() -> None:
    async with pair() as s:
        await s.client.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="poet"))
        async with replica("late", s.log) as late:
            began_with = list(late.calls)

    assert began_with == [("load", "poet", None, False)]


async def test_a_request_is_aborted_wherever_it_is() -> None:
    async with pair() as s:
        call = s.client.generation.StreamGenerate(ask("r1"), metadata=((REPLICA, "b"),))
        await call.read()
        known = await s.client.server.AbortRequest(server_pb2.AbortRequestRequest(request_id="r1"))
        unknown = await s.client.server.AbortRequest(server_pb2.AbortRequestRequest(request_id="r2"))
        call.cancel()

    assert (known.aborted, unknown.aborted) == (True, False)
    assert "r1" in s.b.engine.aborted
    assert s.a.engine.aborted == []


async def test_a_request_is_explained_wherever_it_was() -> None:
    async with pair() as s:
        call = s.client.generation.StreamGenerate(ask("r1"), metadata=((REPLICA, "b"),))
        await call.read()
        known = await s.client.server.ExplainRequest(server_pb2.ExplainRequestRequest(request_id="r1"))
        unknown = await s.client.server.ExplainRequest(server_pb2.ExplainRequestRequest(request_id="r2"))
        call.cancel()

    assert known.explanation.request_id == "r1"
    assert not unknown.HasField("explanation")


async def test_all_read_the_configuration_again(tmp_path: Path) -> None:
    file = tmp_path / "gralora.toml"
    operator = f'[[admin_tokens]]\nsha256 = "{two_tenants().admin_tokens[0].sha256}"\n'
    file.write_text(operator)
    async with pair(reloader=lambda: Reloader(Layers(file, {}, {}).read)) as s:
        file.write_text(operator + "[tenants.acme]\n")
        answer = await s.client.server.ReloadConfig(server_pb2.ReloadConfigRequest(), metadata=bearing(OPERATOR))

        assert list(answer.changed) == ["tenants"]
        for one in (s.a, s.b):
            assert set(one.parts.tenancy.current.settings.tenants) == {"acme"}


async def test_uploads_are_refused_because_no_other_replica_would_have_them() -> None:
    header = adapters_pb2.AdapterUploadHeader(name="poet")
    async with pair() as s:
        sent = s.client.adapters.UploadAdapter(iter([adapters_pb2.UploadAdapterRequest(header=header)]))
        uploading = await failure(sent)
        asking = await failure(s.client.adapters.GetAdapterUpload(adapters_pb2.GetAdapterUploadRequest(header=header)))
        deleting = await failure(
            s.client.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="poet", delete_upload=True))
        )

    for failed in (uploading, asking, deleting):
        assert (failed.code, failed.info.reason) == (Code.FAILED_PRECONDITION, "ADAPTER_UPLOAD")
        assert "replicas share no uploads" in failed.message


async def test_looking_is_the_own_replicas_matter() -> None:
    async with pair() as s:
        s.b.engine.adapters.infos = {"bard": adapter_info("bard")}
        request = adapters_pb2.ListAdaptersRequest()
        told = [await s.client.adapters.ListAdapters(request, metadata=((REPLICA, name),)) for name in ("a", "b")]

    assert [[adapter.name for adapter in one.adapters] for one in told] == [["poet"], ["bard"]]
