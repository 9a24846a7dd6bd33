"""Which role each method needs. Knows neither who calls nor whose adapter it is about."""

from __future__ import annotations

from gralora_server.errors import PermissionDeniedError
from gralora_server.tenants.settings import Role

_OURS = "/gralora.v1."
_RANKS = {role: number for number, role in enumerate(Role)}

ROLES: dict[str, Role] = {
    f"{_OURS}{service}/{method}": role
    for service, role, methods in (
        ("GenerationService", Role.GENERATE, ("Generate", "StreamGenerate")),
        ("AdapterService", Role.GENERATE, ("ListAdapters", "GetAdapter", "WatchAdapters")),
        (
            "AdapterService",
            Role.MANAGE,
            (
                "LoadAdapter",
                "UploadAdapter",
                "GetAdapterUpload",
                "UnloadAdapter",
                "PinAdapter",
                "PromoteAdapter",
                "RollbackAdapter",
                "SetAdapterCanary",
            ),
        ),
        ("ServerService", Role.GENERATE, ("GetServerInfo", "GetLoad", "GetUsage", "Tokenize", "AbortRequest")),
        ("ServerService", Role.ADMIN, ("ReloadConfig",)),
    )
    for method in methods
}


def rank(role: Role) -> int:
    """Who has more may do more."""
    return _RANKS[role]


def check_call(role: Role, method: str) -> None:
    if not may_call(role, method):
        raise PermissionDeniedError(f"call {method}")


def may_call(role: Role, method: str) -> bool:
    """A method of ours that the table lacks is the operator's alone; others, like reflection, are for anybody."""
    needed = ROLES.get(method, Role.ADMIN if method.startswith(_OURS) else Role.GENERATE)
    return rank(role) >= rank(needed)
