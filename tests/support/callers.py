"""Calls that say themselves whose they are: for tests of what a server does for whom, however it would find out."""

from __future__ import annotations

from typing import Any

import grpc
from support.grpc_harness import Served

from gralora_server.decoding import Handler, behavior_of, with_behavior
from gralora_server.interceptors import CallInterceptor, Continuation
from gralora_server.tenants.caller import Caller, set_current
from gralora_server.tenants.settings import LimitSettings, Role, TenancySettings, TenantSettings

TENANT_KEY, ROLE_KEY = "test-tenant", "test-role"


class CallsByMetadata(CallInterceptor):
    """In the place of the real one: believes what the metadata say. Without any the caller stays who it was."""

    async def intercept_service(self, continuation: Continuation, call: grpc.HandlerCallDetails) -> Handler:
        handler = await super().intercept_service(continuation, call)
        told = dict(call.invocation_metadata)
        if TENANT_KEY not in told:
            return handler
        caller = Caller(told[TENANT_KEY], Role(told.get(ROLE_KEY, Role.GENERATE)))
        behavior = behavior_of(handler)

        async def called(request: Any, context: Any) -> Any:
            set_current(caller)
            return await behavior(request, context)

        return with_behavior(handler, called)


def calling(tenant: str, role: Role = Role.GENERATE) -> dict[str, Any]:
    """Arguments of a call by this tenant."""
    return {"metadata": ((TENANT_KEY, tenant), (ROLE_KEY, role.value))}


def limit(s: Served, tenant: str, *, adapters: tuple[str, ...] | None = None, **limits: object) -> None:
    """From now on the server has this one tenant, with these limits."""
    settings = TenantSettings(adapters=adapters, limits=LimitSettings(**limits))
    s.server.quotas.prepare(TenancySettings(tenants={tenant: settings}))()
