"""A server of two tenants and an operator: for tests of what it does for whom, and what it then remembers."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

from support.grpc_harness import Served
from support.grpc_harness import served as served_openly
from support.tenants import OPERATOR, as_, bearing, secret_of, token

from gralora_server.tenants.settings import LimitSettings, Role, TenancySettings, TenantSettings

NAMES = ("acme", "other")


def calling(tenant: str, role: Role = Role.GENERATE) -> dict[str, Any]:
    """Arguments of a call by this tenant; "": the operator."""
    return {"metadata": as_(tenant, role) if tenant else bearing(OPERATOR)}


def tenancy(limited: str = "", *, adapters: tuple[str, ...] | None = None, **limits: object) -> TenancySettings:
    """Some adapters are everybody's."""
    tenants = {
        name: TenantSettings(
            tokens=tuple(token(secret_of(name, role), role) for role in Role),
            adapters=adapters if name == limited else None,
            limits=LimitSettings(**limits) if name == limited else LimitSettings(),
        )
        for name in NAMES
    }
    return TenancySettings(tenants=tenants, admin_tokens=(token(OPERATOR),), public_adapters=("poet", "org/*"))


def served(**settings: object) -> AbstractAsyncContextManager[Served]:
    return served_openly(**{"tenancy": tenancy()} | settings)  # type: ignore[arg-type]


def limit(s: Served, tenant: str, *, adapters: tuple[str, ...] | None = None, **limits: object) -> None:
    """From now on this one has these limits."""
    settings = tenancy(tenant, adapters=adapters, **limits)
    puts = [part.prepare(settings) for part in (s.server.tenancy, s.server.quotas)]
    for put in puts:
        put()
