"""Which role each method needs. Knows neither who calls nor whose adapter it is about."""

from __future__ import annotations

from gralora_server.errors import PermissionDeniedError
from gralora_server.tenants.settings import Role

OURS = (
    "/gralora.v1.",
    "/inference.",
    "/vllm.",
)  # the methods that this server has beside health and reflection begin so
_GENERATION, _ADAPTERS, _SERVER = (f"/gralora.v1.{part}Service/" for part in ("Generation", "Adapter", "Server"))
_KSERVE = "/inference.GRPCInferenceService/"
_VLLM, _VLLM_CONTROL = "/vllm.Inference/", "/vllm.Control/"
_RANKS = {role: number for number, role in enumerate(Role)}

ROLES: dict[str, Role] = {
    f"{service}{method}": role
    for service, role, methods in (
        (_GENERATION, Role.GENERATE, ("Generate", "StreamGenerate")),
        (_ADAPTERS, Role.GENERATE, ("ListAdapters", "GetAdapter", "WatchAdapters")),
        (
            _ADAPTERS,
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
        (
            _SERVER,
            Role.GENERATE,
            ("GetServerInfo", "GetLoad", "GetUsage", "Tokenize", "AbortRequest", "ExplainRequest"),
        ),
        (_SERVER, Role.ADMIN, ("ReloadConfig", "GetActivity")),
        (
            _KSERVE,
            Role.GENERATE,
            (
                "ServerLive",
                "ServerReady",
                "ServerMetadata",
                "ModelReady",
                "ModelMetadata",
                "ModelConfig",
                "ModelInfer",
                "ModelStreamInfer",
                "RepositoryIndex",
            ),
        ),
        (_KSERVE, Role.MANAGE, ("RepositoryModelLoad", "RepositoryModelUnload")),
        (_VLLM, Role.GENERATE, ("Generate", "GenerateStream")),
        (_VLLM_CONTROL, Role.GENERATE, ("GetServerInfo", "Abort", "ListLoras", "GetKvEventSources")),
        (_VLLM_CONTROL, Role.MANAGE, ("LoadLora", "UnloadLora")),
        (_VLLM_CONTROL, Role.ADMIN, ("GetModelInfo",)),  # where files lie is the operator's business
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
    needed = ROLES.get(method, Role.ADMIN if method.startswith(OURS) else Role.GENERATE)
    return rank(role) >= rank(needed)
