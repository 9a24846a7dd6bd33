"""Names of requests: each tenant chooses its own, and the engine knows them all apart."""

from __future__ import annotations

from dataclasses import replace

from gralora_runtime.observation.activity import RequestActivity

_SEPARATOR = " "  # no id that a client sends has one
_NOBODYS = "adapter:"  # how the tenants of adapters that are nobody's begin


class ScopedId(str):
    """Unlike the same id of another tenant. Messages show it as the client wrote it: they use `repr`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(self.partition(_SEPARATOR)[2])


def plain(tenant: str, request_id: str) -> str | None:
    """As the tenant calls it; None: it is another's."""
    whose, separator, own = request_id.partition(_SEPARATOR)
    if not separator:
        return None if tenant else request_id
    return own if whose == tenant else None


def scoped(tenant: str, request_id: str) -> str:
    """The id by which the engine knows a tenant's request. Without a tenant: as it is."""
    return ScopedId(f"{tenant}{_SEPARATOR}{request_id}") if tenant else request_id


def unscoped(request_id: str) -> str:
    """As its tenant calls it, whoever that is."""
    return request_id.partition(_SEPARATOR)[2] or request_id


def owner(tenant: str) -> str:
    """Who asked, of whose share a request is served from; "": nobody is named."""
    return "" if tenant.startswith(_NOBODYS) else tenant


def as_asked(one: RequestActivity) -> RequestActivity:
    """As its client knows it: the id, and the tenant, which is "" where nobody is named."""
    return replace(one, request_id=unscoped(one.request_id), tenant=owner(one.tenant))
