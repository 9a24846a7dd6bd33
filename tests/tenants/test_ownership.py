"""Whose adapters are whose, by their names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gralora_server.tenants.caller import ANYBODY, Caller
from gralora_server.tenants.ownership import Ownership
from gralora_server.tenants.settings import Role, TenancySettings, TenantSettings

SETTINGS = TenancySettings(
    tenants={
        "acme": TenantSettings(),
        "bob": TenantSettings(adapters=("bobs-*", "team/b?b")),
        "eve": TenantSettings(adapters=()),
    },
    public_adapters=("shared/*", "welcome"),
)
OWNERSHIP = Ownership(SETTINGS)
part = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)


def caller(tenant: str, role: Role = Role.MANAGE) -> Caller:
    return Caller(tenant, role)


@pytest.mark.parametrize(
    ("tenant", "name", "sees", "manages"),
    [
        ("acme", "acme/pirate", True, True),
        ("acme", "acme/pirate@main", True, True),
        ("acme", "acme", False, False),
        ("acme", "acme2/pirate", False, False),
        ("acme", "Acme/pirate", False, False),
        ("acme", "bobs-pirate", False, False),
        ("acme", "shared/pirate", True, False),
        ("acme", "welcome", True, False),
        ("acme", "welcome2", False, False),
        ("bob", "bobs-pirate", True, True),
        ("bob", "bobs-team/pirate", True, True),
        ("bob", "team/bob", True, True),
        ("bob", "team/bob2", False, False),
        ("bob", "bob/pirate", False, False),
        ("eve", "eve/pirate", False, False),
        ("eve", "shared/pirate", True, False),
        ("nobody", "nobody/pirate", False, False),
        ("nobody", "shared/pirate", True, False),
    ],
)
def test_a_tenant_has_what_its_globs_say_and_sees_what_is_public(
    tenant: str, name: str, sees: bool, manages: bool
) -> None:
    assert OWNERSHIP.may_see(caller(tenant), name) is sees
    assert OWNERSHIP.may_manage(caller(tenant), name) is manages


@given(part, part, part)
def test_by_default_the_organisation_is_the_tenant(tenant: str, organisation: str, name: str) -> None:
    ownership = Ownership(TenancySettings(tenants={tenant: TenantSettings()}))
    sees = ownership.may_see(caller(tenant), f"{organisation}/{name}")

    assert sees is (organisation == tenant)
    assert ownership.may_manage(caller(tenant), f"{tenant}/{name}")


@given(part, part)
def test_a_tenants_name_is_no_pattern(tenant: str, other: str) -> None:
    """A dot stands for itself."""
    ownership = Ownership(TenancySettings(tenants={"a.b": TenantSettings()}))

    assert not ownership.may_see(caller("a.b"), f"aXb/{tenant}")
    assert ownership.may_see(caller("a.b"), f"a.b/{other}")


@pytest.mark.parametrize("who", [ANYBODY, Caller("", Role.GENERATE), Caller("acme", Role.ADMIN)])
@given(name=part)
def test_for_operators_nothing_is_somebody_elses(who: Caller, name: str) -> None:
    assert OWNERSHIP.may_see(who, name)
    assert OWNERSHIP.may_manage(who, name)


def test_the_base_model_is_for_all_unless_the_operator_keeps_it() -> None:
    kept = Ownership(SETTINGS.model_copy(update={"public_base_model": False}))

    assert OWNERSHIP.may_use_base_model(caller("acme"))
    assert not kept.may_use_base_model(caller("acme"))
    assert kept.may_use_base_model(caller(""))
    assert kept.may_use_base_model(caller("acme", Role.ADMIN))
