"""A watch that goes on while rights change: it ends when its caller may watch no more, and tells no others' names."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest
from support.grpc_harness import failure, served
from support.tenants import OWN, PUBLIC, THEIRS, Metadata, as_, bearing, furnish, secret_of, token, two_tenants
from support.web_tokens import issuer, signed

from gralora.v1 import adapters_pb2
from gralora_server.tenants.roles import ROLES
from gralora_server.tenants.settings import Role, TenancySettings, TenantSettings

Code = grpc.StatusCode
SOON_S = 20.0  # a test that fails waits so long


def watching_again(client, metadata: Metadata):
    return client.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest(), metadata=metadata, timeout=SOON_S)


def with_acme(acme: TenantSettings, **settings: object) -> TenancySettings:
    return two_tenants(**settings).model_copy(update={"tenants": {"acme": acme, "bob": TenantSettings()}})


WITHDRAWN = with_acme(TenantSettings())
ANOTHER_S = with_acme(TenantSettings()).model_copy(
    update={"tenants": {"bob": TenantSettings(tokens=(token(secret_of("acme")),))}}
)


@pytest.mark.parametrize("after", [WITHDRAWN, ANOTHER_S], ids=["nobody's", "another tenant's"])
async def test_it_ends_when_its_token_is_withdrawn(after: TenancySettings) -> None:
    async with served(tenancy=two_tenants()) as s:
        furnish(s)
        call = watching_again(s.client, as_("acme"))
        await call.read()
        s.server.tenancy.replace(after)
        failed = await failure(call.read())

    assert failed.code is Code.UNAUTHENTICATED


async def test_it_ends_when_its_web_token_expires(tmp_path: Path) -> None:
    async with served(tenancy=two_tenants(jwt=issuer(tmp_path, leeway_s=0.0))) as s:
        furnish(s)
        call = watching_again(s.client, bearing(signed(role="generate", exp=time.time() + 2.0)))
        await call.read()
        failed = await failure(call.read())

    assert failed.code is Code.UNAUTHENTICATED


async def test_it_ends_when_its_role_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any role may watch; one day it may be otherwise."""
    async with served(tenancy=two_tenants()) as s:
        furnish(s)
        call = watching_again(s.client, as_("acme", Role.MANAGE))
        await call.read()
        monkeypatch.setitem(ROLES, "/gralora.v1.AdapterService/WatchAdapters", Role.MANAGE)
        s.server.tenancy.replace(with_acme(TenantSettings(tokens=(token(secret_of("acme", Role.MANAGE)),))))
        failed = await failure(call.read())

    assert failed.code is Code.PERMISSION_DENIED


async def test_what_belongs_to_others_now_is_removed_and_what_is_seen_now_is_told() -> None:
    acme = two_tenants().tenants["acme"]
    async with served(tenancy=two_tenants()) as s:
        furnish(s)
        call = watching_again(s.client, as_("acme"))
        first = await call.read()
        s.server.tenancy.replace(with_acme(acme.model_copy(update={"adapters": ("bob/*",)})))
        removed = await call.read()
        anew = await call.read()
        call.cancel()

    assert [one.name for one in first.adapters] == [OWN, PUBLIC]
    assert (list(removed.adapters), list(removed.removed)) == ([], [OWN])
    assert ([one.name for one in anew.adapters], anew.synced) == ([THEIRS, PUBLIC], True)


async def test_an_admin_who_is_one_no_more_sees_his_own_alone() -> None:
    async with served(tenancy=two_tenants()) as s:
        furnish(s)
        call = watching_again(s.client, as_("acme", Role.ADMIN))
        first = await call.read()
        s.server.tenancy.replace(with_acme(TenantSettings(tokens=(token(secret_of("acme", Role.ADMIN)),))))
        removed = await call.read()
        call.cancel()

    assert [one.name for one in first.adapters] == [OWN, THEIRS, PUBLIC]
    assert list(removed.removed) == [THEIRS]
