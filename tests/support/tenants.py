"""Two tenants and an operator, their tokens, and what belongs to whom."""

from __future__ import annotations

import hashlib

from support.fake_engine import adapter_info
from support.grpc_harness import Served

from gralora_runtime.adapters.info import AdapterInfo
from gralora_server.tenants.settings import CertificateSettings, Role, TenancySettings, TenantSettings, TokenSettings

OWN, THEIRS, PUBLIC = "acme/own", "bob/theirs", "shared/all"  # acme is the one who asks
OPERATOR = "an-operators-token"

Metadata = tuple[tuple[str, str], ...]


def token(secret: str, role: Role = Role.GENERATE) -> TokenSettings:
    return TokenSettings(sha256=hashlib.sha256(secret.encode()).hexdigest(), role=role)


def secret_of(tenant: str, role: Role = Role.GENERATE) -> str:
    return f"the-{role}-token-of-{tenant}"


def admitting_the_operator() -> str:
    """What a configuration file has at its end so that there is somebody who may reload it."""
    return f'[[admin_tokens]]\nsha256 = "{token(OPERATOR).sha256}"\n'


def bearing(secret: str) -> Metadata:
    return (("authorization", f"Bearer {secret}"),)


def as_(tenant: str, role: Role = Role.GENERATE) -> Metadata:
    """What a call of the tenant carries."""
    return bearing(secret_of(tenant, role))


def two_tenants(**settings: object) -> TenancySettings:
    """Each with a token of every role."""
    tenants = {
        name: TenantSettings(weight=weight, tokens=tuple(token(secret_of(name, role), role) for role in Role))
        for name, weight in (("acme", 3.0), ("bob", 1.0))
    }
    defaults = {"public_adapters": ("shared/*",), "admin_tokens": (token(OPERATOR),)}
    return TenancySettings(tenants=tenants, **defaults | settings)


class Registered(dict[str, AdapterInfo]):
    """Adapters by name. Remembers which names somebody has looked up."""

    def __init__(self, *names: str) -> None:
        super().__init__({name: adapter_info(name) for name in names})
        self.looked_up: list[object] = []

    def __contains__(self, name: object) -> bool:
        self.looked_up.append(name)
        return super().__contains__(name)


def furnish(s: Served, *names: str) -> None:
    """These adapters are there, and no others."""
    s.engine.adapters.infos = Registered(*(names or (OWN, THEIRS, PUBLIC)))
    s.engine.knows_any_adapter = False


def certified(subject: str, role: Role = Role.GENERATE) -> TenancySettings:
    """Whose certificate has this name is acme; bob has none."""
    acme = TenantSettings(
        weight=3.0,
        certificates=(CertificateSettings(subject=subject, role=role),),
        tokens=(token(secret_of("acme")),),
    )
    return TenancySettings(tenants={"acme": acme, "bob": TenantSettings(tokens=(token(secret_of("bob")),))})
