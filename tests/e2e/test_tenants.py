"""Two tenants on one real engine: they share the machine, and learn nothing of each other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from support.device import DEVICE
from support.grpc_harness import Failed, Served, failure, served
from support.peft_adapters import gralora_config, lora_config
from support.tenants import OPERATOR, OWN, PUBLIC, THEIRS, Metadata, as_, bearing, two_tenants
from support.workspaces import save_workspace

from gralora.v1 import adapters_pb2, generation_pb2
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.assemble import assemble
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory

Code = grpc.StatusCode
ABSENT = "bob/absent"
LONG = "what-all-would-call-it"
PROMPT = list(range(10, 42))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """Of an engine that has been assembled once: what it then compiles may take longer than a test may."""
    adapters = {
        OWN: gralora_config("llama", 8, 2),
        THEIRS: gralora_config("llama", 4, 1),
        f"bob/{LONG}": gralora_config("llama", 4, 2),
        PUBLIC: lora_config("llama", 5),
    }
    root = save_workspace(tmp_path_factory.mktemp("tenants"), adapters)
    config = EngineConfig(
        model=root / "model",
        adapters=in_directory(root / "adapters"),
        device=DEVICE,
        max_num_batched_tokens=64,
        page_size=4,
        kv_cache_bytes=8 << 20,
        adapter_pool_bytes=8 << 20,
        num_threads=1,
    )
    assemble(config).adapters.close()
    return config


@asynccontextmanager
async def really_served(config: EngineConfig) -> AsyncIterator[Served]:
    engine = await AsyncEngine.start(config)
    try:
        async with served(engine=engine, tenancy=two_tenants()) as s:
            yield s
    finally:
        await engine.close()


async def generated(
    s: Served, adapter: str, metadata: Metadata, request_id: str = ""
) -> generation_pb2.GenerateResponse:
    request = generation_pb2.GenerateRequest(
        request_id=request_id,
        adapter=adapter,
        token_ids=generation_pb2.TokenIds(ids=PROMPT),
        stopping=generation_pb2.StoppingParams(max_tokens=4, ignore_eos=True),
    )
    return await s.client.generation.Generate(request, metadata=metadata)


async def cached_tokens(s: Served, adapter: str, metadata: Metadata) -> int:
    return (await generated(s, adapter, metadata)).started.cached_tokens


async def refused(s: Served, adapter: str) -> Failed:
    return await failure(generated(s, adapter, as_("acme")))


async def test_anothers_adapter_is_neither_found_nor_loaded_nor_remembered(config: EngineConfig) -> None:
    async with really_served(config) as s:
        theirs, absent = await refused(s, THEIRS), await refused(s, ABSENT)
        request = adapters_pb2.GetAdapterRequest(name=THEIRS)
        state = (await s.client.adapters.GetAdapter(request, metadata=bearing(OPERATOR))).adapter.state
        asked_for = set(s.engine.adapters._discovery._resolver._absent)
        own_absent = await refused(s, "acme/nothing-like-it")
        asked_for_then = set(s.engine.adapters._discovery._resolver._absent)
        answer = await generated(s, THEIRS, as_("bob"))

    assert theirs.message.replace(THEIRS, ABSENT) == absent.message
    assert (theirs.code, absent.code, own_absent.code) == (Code.NOT_FOUND,) * 3
    assert state == adapters_pb2.ADAPTER_STATE_REGISTERED
    assert (asked_for, asked_for_then) == (set(), {"acme/nothing-like-it"})
    assert answer.started.adapter == THEIRS


async def test_only_visible_names_are_suggested_to_a_tenant_whatever_others_were_told(config: EngineConfig) -> None:
    async with really_served(config) as s:
        asked = f"acme/{LONG}"
        operator = await failure(generated(s, asked, bearing(OPERATOR)))
        tenant = await refused(s, asked)
        near = await refused(s, "acme/owm")

    assert operator.message.endswith(f"did you mean 'bob/{LONG}'?")
    assert tenant.message == f"no adapter named {asked!r} is registered"
    assert near.message.endswith(f"did you mean {OWN!r}?")


async def test_prefixes_are_shared_within_a_tenant_and_by_all_for_public_adapters(config: EngineConfig) -> None:
    async with really_served(config) as s:
        found = {
            adapter: [await cached_tokens(s, adapter, as_(tenant)) for tenant in ("acme", "acme", "bob", "bob")]
            for adapter in ("", PUBLIC)
        }

    assert [tokens > 0 for tokens in found[""]] == [False, True, False, True]
    assert [tokens > 0 for tokens in found[PUBLIC]] == [False, True, True, True]


async def test_one_id_is_each_tenants_own(config: EngineConfig) -> None:
    async with really_served(config) as s:
        long = generation_pb2.StreamGenerateRequest(
            request_id="r1", text="hello", stopping=generation_pb2.StoppingParams(max_tokens=500, ignore_eos=True)
        )
        call = s.client.generation.StreamGenerate(long, metadata=as_("acme"))
        await call.read()
        bobs = await generated(s, "", as_("bob"), "r1")
        again = await failure(generated(s, "", as_("acme"), "r1"))
        call.cancel()
        assert await s.engine.wait_idle(10)

    assert bobs.request_id == "r1"
    assert again.message == "request_id: a request of that id is already running (got 'r1')"


async def test_pages_and_watches_of_a_real_catalogue_know_only_what_the_caller_sees(config: EngineConfig) -> None:
    async with really_served(config) as s:
        listed = await s.client.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest(), metadata=as_("acme"))
        call = s.client.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest(), metadata=as_("acme"))
        first = await call.read()
        await generated(s, THEIRS, as_("bob"))
        await generated(s, OWN, as_("acme"))
        told = []
        while not told or told[-1].state != adapters_pb2.ADAPTER_STATE_RESIDENT:
            told += (await call.read()).adapters
        call.cancel()

    assert ([adapter.name for adapter in listed.adapters], listed.total_size) == ([OWN, PUBLIC], 2)
    assert [adapter.name for adapter in first.adapters] == [OWN, PUBLIC]
    assert {adapter.name for adapter in told} == {OWN}
    assert AdapterState.RESIDENT in {info.state for info in s.engine.adapters.list() if info.name == THEIRS}
