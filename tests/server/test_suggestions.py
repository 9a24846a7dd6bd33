"""What a tenant may have meant is something that it may see, whatever the engine would suggest."""

from __future__ import annotations

import pytest
from support.grpc_harness import ask_once, failure, served
from support.tenants import OPERATOR, as_, bearing, furnish, two_tenants

from gralora.v1 import adapters_pb2
from gralora_runtime.errors import AdapterNotFoundError, AdapterVersionNotFoundError
from gralora_server.tenants.settings import Role

ASKED, ENGINES = "acme/pirat", "bob/a-pirat"  # what a tenant asks for, and what the engine finds nearest


@pytest.mark.parametrize(
    ("names", "suggestion"),
    [
        (("acme/pirate", "bob/a-pirat"), "acme/pirate"),
        (("bob/a-pirat",), ""),
        (("acme/pirates1", "acmf/pirat"), "acme/pirates1"),
        (("acmo/pirat", "bob/a-pirat"), "acmo/pirat"),
    ],
    ids=["own", "only-anothers", "anothers-is-nearer", "public"],
)
@pytest.mark.parametrize("engines", [ENGINES, ""], ids=["engine-suggests", "engine-does-not"])
async def test_only_what_the_caller_sees_is_suggested(names: tuple[str, ...], suggestion: str, engines: str) -> None:
    async with served(tenancy=two_tenants(public_adapters=("acmo/*",))) as s:
        furnish(s, *names)
        s.engine.refusals = [AdapterNotFoundError(ASKED, engines)]
        failed = await failure(s.client.generation.Generate(ask_once(adapter=ASKED), metadata=as_("acme")))

    meant = f"; did you mean {suggestion!r}?" if suggestion else ""
    assert failed.message == f"no adapter named {ASKED!r} is registered{meant}"
    assert "bob" not in str(failed.details)


async def test_a_load_suggests_no_more() -> None:
    request = adapters_pb2.LoadAdapterRequest(name=ASKED)
    async with served(tenancy=two_tenants()) as s:
        furnish(s, ENGINES)
        s.engine.adapters.error = AdapterNotFoundError(ASKED, ENGINES)
        failed = await failure(s.client.adapters.LoadAdapter(request, metadata=as_("acme", Role.MANAGE)))

    assert failed.message == f"no adapter named {ASKED!r} is registered"


async def test_an_operator_is_told_what_the_engine_suggests() -> None:
    async with served(tenancy=two_tenants()) as s:
        s.engine.refusals = [AdapterNotFoundError(ASKED, ENGINES)]
        failed = await failure(s.client.generation.Generate(ask_once(adapter=ASKED), metadata=bearing(OPERATOR)))

    assert failed.message.endswith(f"did you mean {ENGINES!r}?")


async def test_a_version_that_a_name_lacks_is_told_as_it_is() -> None:
    async with served(tenancy=two_tenants()) as s:
        s.engine.refusals = [AdapterVersionNotFoundError("acme/own", "9", [1, 2])]
        failed = await failure(s.client.generation.Generate(ask_once(adapter="acme/own@9"), metadata=as_("acme")))

    assert failed.info.reason == "ADAPTER_VERSION_NOT_FOUND"
    assert failed.message == "adapter 'acme/own' has no version 9 (it has 1, 2)"
