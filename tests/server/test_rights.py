"""Who may call what about whose adapter: every RPC, every role, every relation, over a socket."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import grpc
import pytest
from support.fake_engine import FakeEngine, finished
from support.grpc_harness import Client, Failed, Served, ask, ask_once, failure, read_all, served
from support.kserve import Talk, infer
from support.tenants import OPERATOR, OWN, PUBLIC, THEIRS, Metadata, as_, bearing, furnish, two_tenants
from support.vllm_grpc import as_dynamo, generate, vllm_served

from gralora.foreign import kserve_pb2, vllm_pb2
from gralora.v1 import adapters_pb2, generation_pb2, server_pb2
from gralora_runtime.request import GenerationRequest
from gralora_server.tenants.roles import ROLES, may_call
from gralora_server.tenants.settings import Role

Code = grpc.StatusCode
OK, ABSENT, DENIED = Code.OK, Code.NOT_FOUND, Code.PERMISSION_DENIED
NO_UPLOADS = Code.FAILED_PRECONDITION  # as far as a call gets that may go on: this server keeps none

# How a name that a call is about is related to acme, who calls. Others' names are as long as each other.
RELATIONS = {
    "own": OWN,
    "public": PUBLIC,
    "theirs": THEIRS,
    "absent": "bob/absent",
    "absent-own": "acme/there-is-none",
}
HEADER = {"files": [{"name": "adapter_config.json", "size": 2, "sha256": "0" * 64}]}

Outcome = Code | list[str]  # or the names that the call told


@dataclass(frozen=True, slots=True)
class Rpc:
    """One RPC: how it is called about a name, and how that ends for each relation, in the order of `RELATIONS`."""

    call: Callable[[Client, str, Metadata], Awaitable[object]]
    tenant: tuple[Outcome, ...]
    admin: tuple[Outcome, ...]
    role: Role = Role.GENERATE


ANYWAY = (OK,) * 5
UNKNOWN = ["ADAPTER_NOT_FOUND"]
ANSWERS = (([], [], UNKNOWN, UNKNOWN, UNKNOWN), ([], [], [], UNKNOWN, UNKNOWN))
USES = ((OK, OK, ABSENT, ABSENT, ABSENT), (OK, OK, OK, ABSENT, ABSENT))
TELLS = (([OWN], [PUBLIC], [], [], []), ([OWN], [PUBLIC], [THEIRS], [], []))
CHANGES = ((OK, DENIED, ABSENT, ABSENT, ABSENT), (OK, OK, OK, ABSENT, ABSENT))
CREATES = ((OK, DENIED, DENIED, DENIED, OK), ANYWAY)
UPLOADS = ((NO_UPLOADS, DENIED, DENIED, DENIED, NO_UPLOADS), (NO_UPLOADS,) * 5)


async def listed(client: Client, name: str, metadata: Metadata) -> list[str]:
    answer = await client.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest(prefix=name), metadata=metadata)
    assert answer.total_size == len(answer.adapters)
    return [adapter.name for adapter in answer.adapters]


async def watched(client: Client, name: str, metadata: Metadata) -> list[str]:
    call = client.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest(prefix=name), metadata=metadata)
    news = await call.read()
    call.cancel()
    assert news.synced
    return [adapter.name for adapter in news.adapters]


async def indexed(client: Client, name: str, metadata: Metadata) -> list[str]:
    answer = await client.kserve.RepositoryIndex(kserve_pb2.RepositoryIndexRequest(), metadata=metadata)
    return [model.name for model in answer.models if model.name == name]


async def ready(client: Client, name: str, metadata: Metadata) -> list[str]:
    answer = await client.kserve.ModelReady(kserve_pb2.ModelReadyRequest(name=name), metadata=metadata)
    return [name] if answer.ready else []


async def streamed(client: Client, name: str, metadata: Metadata) -> list[str]:
    """Of each answer the reason, if it is an error."""
    talk = Talk(client, metadata=metadata)
    await talk.send(infer(model=name))
    messages = await talk.answers()
    return [message.error_message.partition(":")[0] for message in messages if message.error_message]


async def loras(client: Client, name: str, metadata: Metadata) -> list[str]:
    answer = await client.control.ListLoras(vllm_pb2.ListLorasRequest(), metadata=metadata)
    return [adapter.lora_name for adapter in answer.adapters if adapter.lora_name == name]


TELLING = (listed, watched, indexed, ready, streamed, loras)


def unary(service: str, method: str, request: type, **fields: object) -> Callable[..., Awaitable[object]]:
    """A call whose request names the adapter as `name`."""

    def call(client: Client, name: str, metadata: Metadata) -> Awaitable[object]:
        return getattr(getattr(client, service), method)(request(name=name, **fields), metadata=metadata)

    return call


def header(name: str) -> adapters_pb2.AdapterUploadHeader:
    return adapters_pb2.AdapterUploadHeader(name=name, **HEADER)


def change(method: str, **fields: object) -> Rpc:
    request = getattr(adapters_pb2, f"{method}Request")
    return Rpc(unary("adapters", method, request, **fields), *CHANGES, Role.MANAGE)


def repository(method: str, outcomes: tuple[tuple[Outcome, ...], tuple[Outcome, ...]]) -> Rpc:
    request = getattr(kserve_pb2, f"{method}Request")
    return Rpc(lambda c, n, m: getattr(c.kserve, method)(request(model_name=n), metadata=m), *outcomes, Role.MANAGE)


def lora(method: str, outcomes: tuple[tuple[Outcome, ...], tuple[Outcome, ...]]) -> Rpc:
    request = getattr(vllm_pb2, f"{method}Request")
    return Rpc(lambda c, n, m: getattr(c.control, method)(request(lora_name=n), metadata=m), *outcomes, Role.MANAGE)


def controlling(method: str, request: object, role: Role = Role.GENERATE) -> Rpc:
    return Rpc(lambda c, _, m: getattr(c.control, method)(request, metadata=m), ANYWAY, ANYWAY, role)


def about_the_server(method: str) -> Rpc:
    request = getattr(kserve_pb2, f"{method}Request")()
    return Rpc(lambda c, _, m: getattr(c.kserve, method)(request, metadata=m), ANYWAY, ANYWAY)


def about_no_adapter(method: str, *, role: Role = Role.GENERATE, **fields: object) -> Rpc:
    request = getattr(server_pb2, f"{method}Request")(**fields)
    return Rpc(lambda c, _, m: getattr(c.server, method)(request, metadata=m), ANYWAY, ANYWAY, role)


RPCS = {
    "Generate": Rpc(lambda c, n, m: c.generation.Generate(ask_once(adapter=n), metadata=m), *USES),
    "StreamGenerate": Rpc(lambda c, n, m: read_all(c.generation.StreamGenerate(ask(adapter=n), metadata=m)), *USES),
    "ListAdapters": Rpc(listed, *TELLS),
    "GetAdapter": Rpc(unary("adapters", "GetAdapter", adapters_pb2.GetAdapterRequest), *USES),
    "WatchAdapters": Rpc(watched, *TELLS),
    "LoadAdapter": Rpc(unary("adapters", "LoadAdapter", adapters_pb2.LoadAdapterRequest), *CREATES, Role.MANAGE),
    "UploadAdapter": Rpc(
        lambda c, n, m: c.adapters.UploadAdapter(
            iter([adapters_pb2.UploadAdapterRequest(header=header(n))]), metadata=m
        ),
        *UPLOADS,
        Role.MANAGE,
    ),
    "GetAdapterUpload": Rpc(
        lambda c, n, m: c.adapters.GetAdapterUpload(adapters_pb2.GetAdapterUploadRequest(header=header(n)), metadata=m),
        *UPLOADS,
        Role.MANAGE,
    ),
    "UnloadAdapter": change("UnloadAdapter"),
    "PinAdapter": change("PinAdapter", pinned=True),
    "PromoteAdapter": change("PromoteAdapter", version="2"),
    "RollbackAdapter": change("RollbackAdapter"),
    "SetAdapterCanary": change("SetAdapterCanary", version="2", share=0.5),
    "GetServerInfo": about_no_adapter("GetServerInfo"),
    "GetLoad": about_no_adapter("GetLoad"),
    "GetUsage": about_no_adapter("GetUsage"),
    "Tokenize": about_no_adapter("Tokenize", text="hello"),
    "AbortRequest": about_no_adapter("AbortRequest", request_id="r1"),
    "ExplainRequest": about_no_adapter("ExplainRequest", request_id="r1"),
    "GetActivity": about_no_adapter("GetActivity", role=Role.ADMIN),
    "ReloadConfig": about_no_adapter("ReloadConfig", role=Role.ADMIN),
    "ServerLive": about_the_server("ServerLive"),
    "ServerReady": about_the_server("ServerReady"),
    "ServerMetadata": about_the_server("ServerMetadata"),
    "ModelReady": Rpc(ready, *TELLS),
    "ModelMetadata": Rpc(unary("kserve", "ModelMetadata", kserve_pb2.ModelMetadataRequest), *USES),
    "ModelConfig": Rpc(unary("kserve", "ModelConfig", kserve_pb2.ModelConfigRequest), *USES),
    "ModelInfer": Rpc(lambda c, n, m: c.kserve.ModelInfer(infer(model=n), metadata=m), *USES),
    "ModelStreamInfer": Rpc(streamed, *ANSWERS),
    "RepositoryIndex": Rpc(indexed, *TELLS),
    "RepositoryModelLoad": repository("RepositoryModelLoad", CREATES),
    "RepositoryModelUnload": repository("RepositoryModelUnload", CHANGES),
    "vllm Generate": Rpc(lambda c, n, m: c.inference.Generate(generate(lora_name=n), metadata=m), *USES),
    "vllm GenerateStream": Rpc(
        lambda c, n, m: read_all(c.inference.GenerateStream(as_dynamo(lora_name=n), metadata=m)), *USES
    ),
    "vllm GetServerInfo": controlling("GetServerInfo", vllm_pb2.GetServerInfoRequest()),
    "vllm GetModelInfo": controlling("GetModelInfo", vllm_pb2.GetModelInfoRequest(), Role.ADMIN),
    "vllm Abort": controlling("Abort", vllm_pb2.AbortRequest(request_ids=["r1"])),
    "vllm GetKvEventSources": controlling("GetKvEventSources", vllm_pb2.GetKvEventSourcesRequest()),
    "vllm ListLoras": Rpc(loras, *TELLS),
    "vllm LoadLora": lora("LoadLora", CREATES),
    "vllm UnloadLora": lora("UnloadLora", CHANGES),
}


def methods() -> Iterator[str]:
    """All that the services have, as their descriptors say."""
    for file in (generation_pb2, adapters_pb2, server_pb2, kserve_pb2, vllm_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            yield from (f"/{service.full_name}/{method.name}" for method in service.methods)


def named(method: str) -> str:
    """Two services have a `Generate`, and two a `GetServerInfo`."""
    prefix = "vllm " if method.startswith("/vllm.") else ""
    return prefix + method.rpartition("/")[2]


def test_every_rpc_is_in_the_tables() -> None:
    """A new one has to say who may call it, here and in the server."""
    assert set(ROLES) == set(methods())
    assert set(RPCS) == {named(method) for method in methods()}


@pytest.mark.parametrize("package", ["gralora.v1", "inference", "vllm"])
def test_a_method_that_no_table_has_is_the_operators(package: str) -> None:
    assert [role for role in Role if may_call(role, f"/{package}.Service/New")] == [Role.ADMIN]


async def outcome(s: Served, rpc: Rpc, name: str, metadata: Metadata) -> Outcome:
    s.engine.script = [finished()]
    try:
        answer = await rpc.call(s.client, name, metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return answer if rpc.call in TELLING else OK


def untouched(engine: FakeEngine) -> bool:
    """Nobody asked it for anything: not even whether it has a name."""
    return engine.requests == [] and engine.adapters.calls == [] and engine.adapters.infos.looked_up == []


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("method", RPCS)
async def test_each_role_may_what_it_may(method: str, relation: str) -> None:
    rpc, name, column = RPCS[method], RELATIONS[relation], list(RELATIONS).index(relation)
    expected = {
        Role.GENERATE: rpc.tenant[column] if rpc.role is Role.GENERATE else DENIED,
        Role.MANAGE: DENIED if rpc.role is Role.ADMIN else rpc.tenant[column],
        Role.ADMIN: rpc.admin[column],
    }
    found = {}
    for role in Role:
        async with vllm_served(kserve=True, tenancy=two_tenants()) as s:
            furnish(s)
            found[role] = await outcome(s, rpc, name, as_("acme", role))
            if role is not Role.ADMIN and (expected[role] is DENIED or relation in ("theirs", "absent")):
                assert untouched(s.engine)

    assert found == expected


@pytest.mark.parametrize("method", [name for name, rpc in RPCS.items() if ABSENT in rpc.tenant or DENIED in rpc.tenant])
async def test_another_tenants_adapter_is_refused_as_one_that_there_is_not(method: str) -> None:
    """To the letter, in all that a client receives."""
    async with vllm_served(kserve=True, tenancy=two_tenants()) as s:
        furnish(s)
        refusals = [
            await failure(RPCS[method].call(s.client, name, as_("acme", Role.MANAGE)))
            for name in (THEIRS, RELATIONS["absent"])
        ]

    assert len({repr(anonymous(failed)) for failed in refusals}) == 1


@pytest.mark.parametrize("suffix", ["", "@3", "@sha256:0123456789ab"], ids=["name", "number", "digest"])
@pytest.mark.parametrize("method", ["Generate", "UnloadAdapter", "PinAdapter"])
async def test_a_version_is_as_its_name(method: str, suffix: str) -> None:
    async with served(tenancy=two_tenants()) as s:
        furnish(s)
        refusals = [
            await failure(RPCS[method].call(s.client, name + suffix, as_("acme", Role.MANAGE)))
            for name in (THEIRS, RELATIONS["absent"])
        ]
        allowed = await outcome(s, RPCS["Generate"], OWN + suffix, as_("acme"))

    assert {failed.code for failed in refusals} == {ABSENT}
    assert len({repr(anonymous(failed)) for failed in refusals}) == 1
    assert allowed is OK


def anonymous(failed: Failed) -> tuple[object, ...]:
    """Without the name that was asked for."""
    texts = (failed.message, *(f"{kind} {detail}" for kind, detail in sorted(failed.details.items())))
    hidden = [text.replace(THEIRS, "NAME").replace(RELATIONS["absent"], "NAME") for text in texts]
    return (failed.code, hidden, sorted(failed.trailers.keys()), len(failed.trailers["grpc-status-details-bin"]))


async def test_within_its_own_names_a_tenant_is_told_the_same_of_what_there_is_not() -> None:
    async with served(tenancy=two_tenants()) as s:
        furnish(s)
        inside, outside = [
            await failure(RPCS["Generate"].call(s.client, name, as_("acme")))
            for name in (RELATIONS["absent-own"], THEIRS)
        ]

    assert inside.message.replace(RELATIONS["absent-own"], THEIRS) == outside.message


# --- several adapters at once


def mix_of(*names: str) -> generation_pb2.StreamGenerateRequest:
    return generation_pb2.StreamGenerateRequest(text="hello", adapters=[{"name": n, "weight": 0.5} for n in names])


@pytest.mark.parametrize("suffix", ["", "@3"], ids=["name", "version"])
@pytest.mark.parametrize("place", [0, 1])
async def test_each_adapter_of_a_mix_has_to_be_the_callers_to_use(place: int, suffix: str) -> None:
    async with served(tenancy=two_tenants(public_base_model=False)) as s:
        furnish(s)
        s.engine.script = [finished()]
        refusals = []
        for name in (THEIRS, RELATIONS["absent"]):
            names = [OWN, PUBLIC]
            names[place] = name + suffix
            refusals.append(
                await failure(read_all(s.client.generation.StreamGenerate(mix_of(*names), metadata=as_("acme"))))
            )
        assert untouched(s.engine)
        await read_all(s.client.generation.StreamGenerate(mix_of(OWN, PUBLIC + suffix), metadata=as_("acme")))

    assert {failed.code for failed in refusals} == {ABSENT}
    assert len({repr(anonymous(failed)) for failed in refusals}) == 1
    (request,) = s.engine.requests
    assert (request.tenant, request.prefix_scope) == ("acme", "acme")


@pytest.mark.parametrize(("names", "scope"), [([PUBLIC, f"{PUBLIC}@3"], ""), ([PUBLIC, OWN], "acme"), ([OWN], "acme")])
async def test_prefixes_of_a_mix_are_everybodys_if_all_its_adapters_are(names: list[str], scope: str) -> None:
    async with served(tenancy=two_tenants()) as s:
        furnish(s)
        s.engine.script = [finished()]
        await read_all(s.client.generation.StreamGenerate(mix_of(*names), metadata=as_("acme")))

    (request,) = s.engine.requests
    assert request.prefix_scope == scope


# --- loading from a path


async def test_only_an_admin_says_where_files_lie() -> None:
    request = adapters_pb2.LoadAdapterRequest(name=OWN, path="bob/theirs")
    async with served(tenancy=two_tenants()) as s:
        failed = await failure(s.client.adapters.LoadAdapter(request, metadata=as_("acme", Role.MANAGE)))
        refused = list(s.engine.adapters.calls)
        await s.client.adapters.LoadAdapter(request, metadata=as_("acme", Role.ADMIN))

    assert (failed.code, refused) == (DENIED, [])
    assert len(s.engine.adapters.calls) == 1


# --- the base model


@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize(
    "metadata", [as_("acme"), as_("acme", Role.ADMIN), bearing(OPERATOR)], ids=["tenant", "admin", "operator"]
)
async def test_the_base_model_is_for_tenants_if_the_operator_says_so(public: bool, metadata: Metadata) -> None:
    async with served(tenancy=two_tenants(public_base_model=public)) as s:
        furnish(s)
        found = await outcome(s, RPCS["Generate"], "", metadata)

    is_denied = not public and metadata == as_("acme")
    assert found is (DENIED if is_denied else OK)
    assert len(s.engine.requests) == (not is_denied)


# --- lists and watches


async def test_pages_totals_and_tokens_know_only_what_the_caller_sees() -> None:
    own = [f"acme/a{i}" for i in range(5)]
    async with served(tenancy=two_tenants()) as s:
        furnish(s, *own, *(f"acme-{i}" for i in range(5)), *(f"bob/b{i}" for i in range(50)))
        pages, page_token = [], ""
        while True:
            request = adapters_pb2.ListAdaptersRequest(page_size=2, page_token=page_token)
            pages.append(await s.client.adapters.ListAdapters(request, metadata=as_("acme")))
            if not (page_token := pages[-1].next_page_token):
                break
        beyond = adapters_pb2.ListAdaptersRequest(page_size=2, page_token="bob/b1")
        rest = await s.client.adapters.ListAdapters(beyond, metadata=as_("acme"))

    assert [[adapter.name for adapter in page.adapters] for page in pages] == [own[:2], own[2:4], own[4:]]
    assert [page.next_page_token for page in pages] == ["acme/a1", "acme/a3", ""]
    assert {page.total_size for page in [*pages, rest]} == {5}
    assert (list(rest.adapters), rest.next_page_token) == ([], "")


async def test_a_watch_tells_nothing_of_others_neither_changes_nor_removals() -> None:
    async with served(tenancy=two_tenants()) as s:
        furnish(s)
        call = s.client.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest(), metadata=as_("acme"))
        first = await call.read()
        adapters = s.engine.adapters
        for name in (THEIRS, "bob/absent"):
            adapters.infos.pop(name, None)
            adapters.changes.touch(name)
        adapters.infos.pop(OWN)
        adapters.changes.touch(OWN)
        then = await call.read()
        call.cancel()

    assert [adapter.name for adapter in first.adapters] == [OWN, PUBLIC]
    assert (list(then.adapters), list(then.removed)) == ([], [OWN])


# --- what a tenant's request is in the engine


@pytest.mark.parametrize(
    ("adapter", "scope"),
    [(OWN, "acme"), (f"{OWN}@3", "acme"), (PUBLIC, ""), (f"{PUBLIC}@3", ""), ("", "acme")],
)
async def test_prefixes_are_a_tenants_own_but_for_public_adapters(adapter: str, scope: str) -> None:
    async with served(tenancy=two_tenants()) as s:
        furnish(s)
        await outcome(s, RPCS["Generate"], adapter, as_("acme"))

    (request,) = s.engine.requests
    assert (request.tenant, request.weight, request.prefix_scope) == ("acme", 3.0, scope)
    assert request.base_prefix_scope == "acme"


@pytest.mark.parametrize("metadata", [bearing(OPERATOR), ()], ids=["operator", "no-tenants"])
async def test_a_request_of_no_tenant_is_as_it_was_before_there_were_tenants(metadata: Metadata) -> None:
    async with served(**({"tenancy": two_tenants()} if metadata else {})) as s:
        await outcome(s, RPCS["Generate"], THEIRS, metadata)

    (request,) = s.engine.requests
    assert request == GenerationRequest(request_id="r1", prompt=request.prompt, adapter=THEIRS)


# --- ids of requests


async def test_tenants_may_choose_the_same_id_and_abort_only_their_own() -> None:
    abort = server_pb2.AbortRequestRequest(request_id="r1")
    async with served(tenancy=two_tenants()) as s:
        call = s.client.generation.StreamGenerate(ask(), metadata=as_("acme"))
        announced = await call.read()
        by_bob = await s.client.server.AbortRequest(abort, metadata=as_("bob", Role.MANAGE))
        bobs = s.client.generation.StreamGenerate(ask(), metadata=as_("bob"))
        announced_to_bob = await bobs.read()
        other = ask_once()
        other.text = "another prompt"
        again = await failure(s.client.generation.Generate(other, metadata=as_("acme")))
        untouched = list(s.engine.aborted)
        by_acme = await s.client.server.AbortRequest(abort, metadata=as_("acme"))
        after_acme = list(s.engine.aborted)
        by_operator = await s.client.server.AbortRequest(abort, metadata=bearing(OPERATOR))

    assert announced.request_id == announced_to_bob.request_id == "r1"
    assert not by_bob.aborted
    assert untouched == []
    assert again.code is Code.INVALID_ARGUMENT
    assert again.message == "request_id: a request of that id is already running (got 'r1')"
    assert "acme" not in str(again.details)
    assert by_acme.aborted
    assert after_acme == ["acme r1"]
    assert by_operator.aborted
    assert "bob r1" in s.engine.aborted


async def test_an_id_that_another_tenants_request_has_inside_is_no_way_to_it() -> None:
    async with served(tenancy=two_tenants()) as s:
        call = s.client.generation.StreamGenerate(ask(), metadata=as_("acme"))
        await call.read()
        guesses = [server_pb2.AbortRequestRequest(request_id=guess) for guess in ("r1", "acme/r1", "acmer1")]
        answers = [await s.client.server.AbortRequest(guess, metadata=as_("bob")) for guess in guesses]
        inside = server_pb2.AbortRequestRequest(request_id=s.engine.requests[0].request_id)
        failed = await failure(s.client.server.AbortRequest(inside, metadata=as_("bob")))
        aborted = list(s.engine.aborted)

    assert [answer.aborted for answer in answers] == [False] * 3
    assert failed.code is Code.INVALID_ARGUMENT
    assert aborted == []
