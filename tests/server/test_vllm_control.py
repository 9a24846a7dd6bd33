"""What vLLM's protocol tells of the server and its adapters, and changes of those, over a socket."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from support.fake_engine import INFO, adapter_info
from support.grpc_harness import failure
from support.tenants import OWN, as_, furnish, two_tenants
from support.vllm_grpc import MODEL_DIR, vllm_served

from gralora.foreign import vllm_pb2
from gralora_runtime.errors import AdapterBusyError, AdapterNotFoundError, AdapterRejectedError
from gralora_server.tenants.settings import Role
from gralora_server.vllm_grpc.naming import lora_id

Code = grpc.StatusCode
NAMES = [f"a{number:04}" for number in range(2500)]


async def test_the_server_says_what_dynamo_wants_to_know() -> None:
    async with vllm_served() as s:
        info = await s.client.control.GetServerInfo(vllm_pb2.GetServerInfoRequest())
        again = await s.client.control.GetServerInfo(vllm_pb2.GetServerInfoRequest())

    assert (info.api_version, info.engine_version) == ("vllm", INFO.version)
    assert info.instance_id
    assert again == info
    assert (info.max_model_len, info.kv_block_size, info.total_kv_blocks) == (2048, 16, 100)
    assert (info.max_running_requests, info.max_batched_tokens, info.max_loras) == (32, 256, 4096)
    sizes = {field.name: value for field, value in info.parallelism.ListFields()}
    assert set(sizes.values()) == {1}
    assert len(sizes) == len(vllm_pb2.ParallelismInfo.DESCRIPTOR.fields) - 1  # the rank is 0


async def test_two_servers_are_two_instances() -> None:
    ids = set()
    for _ in range(2):
        async with vllm_served() as s:
            ids.add((await s.client.control.GetServerInfo(vllm_pb2.GetServerInfoRequest())).instance_id)

    assert len(ids) == 2


async def test_the_model_is_a_directory_that_frontends_can_read() -> None:
    async with vllm_served() as s:
        info = await s.client.control.GetModelInfo(vllm_pb2.GetModelInfoRequest())
    async with vllm_served(model_dir=Path("models/fake")) as s:
        relative = await s.client.control.GetModelInfo(vllm_pb2.GetModelInfoRequest())

    assert (info.model_id, info.served_model_name) == (str(MODEL_DIR), "fake")
    assert (info.supports_text_input, info.supports_token_ids_input, info.supports_lora) == (True, True, True)
    assert relative.model_id == str(Path.cwd() / "models" / "fake")


async def test_there_are_no_events_of_the_cache() -> None:
    async with vllm_served() as s:
        answer = await s.client.control.GetKvEventSources(vllm_pb2.GetKvEventSourcesRequest())

    assert answer == vllm_pb2.GetKvEventSourcesResponse()


async def test_while_the_model_loads_it_says_so() -> None:
    async with vllm_served(started=False) as s:
        control = s.client.control
        failures = [
            await failure(control.GetServerInfo(vllm_pb2.GetServerInfoRequest())),
            await failure(control.GetModelInfo(vllm_pb2.GetModelInfoRequest())),
            await failure(control.ListLoras(vllm_pb2.ListLorasRequest())),
            await failure(control.LoadLora(vllm_pb2.LoadLoraRequest(lora_name="poet"))),
        ]

    assert {(failed.code, failed.info.reason) for failed in failures} == {(Code.UNAVAILABLE, "STARTING")}


# --- adapters


async def test_every_adapter_is_listed_with_an_id_and_a_source() -> None:
    async with vllm_served() as s:
        s.engine.adapters.infos["fresh"] = replace(adapter_info("fresh"), source="")
        answer = await s.client.control.ListLoras(vllm_pb2.ListLorasRequest())

    fresh, poet = answer.adapters
    assert (poet.lora_name, poet.source_path, poet.lora_id) == ("poet", "/adapters/poet", lora_id("poet"))
    assert (fresh.lora_name, fresh.source_path) == ("fresh", "fresh")


async def test_the_list_has_all_pages_and_ids_are_above_0_and_differ() -> None:
    async with vllm_served() as s:
        s.engine.adapters.infos = {name: adapter_info(name) for name in NAMES}
        first = await s.client.control.ListLoras(vllm_pb2.ListLorasRequest())
        second = await s.client.control.ListLoras(vllm_pb2.ListLorasRequest())

    assert [adapter.lora_name for adapter in first.adapters] == NAMES
    assert first == second
    ids = {adapter.lora_id for adapter in first.adapters}
    assert len(ids) == len(NAMES)
    assert all(0 < one <= 2**53 for one in ids)


def test_an_id_is_the_same_in_every_server() -> None:
    """Discovery has records of several, and of those before a restart."""
    assert lora_id("poet") == 4390968571373782


async def test_adapters_are_loaded_from_a_path_or_by_their_name_and_unloaded() -> None:
    async with vllm_served() as s:
        control = s.client.control
        load = vllm_pb2.LoadLoraRequest(lora_name="bard", source_path="/cache/bard")
        loaded = (await control.LoadLora(load)).adapter
        await control.LoadLora(vllm_pb2.LoadLoraRequest(lora_name="bard"))
        unloaded = (await control.UnloadLora(vllm_pb2.UnloadLoraRequest(lora_name="poet"))).adapter

    assert s.engine.adapters.calls == [
        ("load", "bard", Path("/cache/bard"), False),
        ("load", "bard", None, False),
        ("unload", "poet"),
    ]
    assert (loaded.lora_name, loaded.lora_id, loaded.source_path) == ("bard", lora_id("bard"), "/adapters/bard")
    assert (unloaded.lora_name, unloaded.lora_id) == ("poet", lora_id("poet"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AdapterNotFoundError("poet"), Code.NOT_FOUND),
        (AdapterRejectedError("poet", ["it is broken"]), Code.FAILED_PRECONDITION),
        (AdapterBusyError("poet", 2), Code.FAILED_PRECONDITION),
    ],
    ids=["absent", "broken", "busy"],
)
async def test_what_cannot_be_changed_ends_as_with_our_own_methods(error: Exception, code: Code) -> None:
    async with vllm_served() as s:
        s.engine.adapters.error = error
        failures = [
            await failure(s.client.control.LoadLora(vllm_pb2.LoadLoraRequest(lora_name="poet"))),
            await failure(s.client.control.UnloadLora(vllm_pb2.UnloadLoraRequest(lora_name="poet"))),
        ]

    assert {failed.code for failed in failures} == {code}
    assert {failed.info.reason for failed in failures} == {error.reason}


@pytest.mark.parametrize(
    ("load", "field"),
    [
        ({"lora_name": "a b"}, "lora_name"),
        ({}, "lora_name"),
        ({"lora_name": "a", "source_path": "/" * 5000}, "source_path"),
    ],
    ids=["name", "no-name", "path"],
)
async def test_a_wrong_name_or_path_is_named_as_the_client_wrote_it(load: dict[str, str], field: str) -> None:
    async with vllm_served() as s:
        failed = await failure(s.client.control.LoadLora(vllm_pb2.LoadLoraRequest(**load)))
        nameless = await failure(s.client.control.UnloadLora(vllm_pb2.UnloadLoraRequest()))

    assert (failed.code, failed.fields) == (Code.INVALID_ARGUMENT, [field])
    assert nameless.fields == ["lora_name"]
    assert s.engine.adapters.calls == []


async def test_only_an_admin_says_where_files_lie() -> None:
    load = vllm_pb2.LoadLoraRequest(lora_name=OWN, source_path="bob/theirs")
    async with vllm_served(tenancy=two_tenants()) as s:
        furnish(s)
        failed = await failure(s.client.control.LoadLora(load, metadata=as_("acme", Role.MANAGE)))
        refused = list(s.engine.adapters.calls)
        await s.client.control.LoadLora(load, metadata=as_("acme", Role.ADMIN))

    assert (failed.code, refused) == (Code.PERMISSION_DENIED, [])
    assert len(s.engine.adapters.calls) == 1
