"""What an operator says of tenants, as the configuration file has it. Checked when it is read; decides nothing."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from gralora_server.settings.values import Bytes

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Size = Annotated[Bytes, Field(ge=1)]


class Strict(BaseModel):
    """A word that nobody knows is a mistake, and not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Role(StrEnum):
    """Each may do what those before it may."""

    GENERATE = "generate"  # use the tenant's adapters
    MANAGE = "manage"  # load, upload, promote ... the tenant's own adapters
    ADMIN = "admin"  # everything, for every tenant


class TokenSettings(Strict):
    """A bearer token, of which only the hash is kept (`gralora tokens new` prints both)."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # of the token's UTF-8 bytes
    role: Role = Role.GENERATE
    expires: datetime | None = None  # None: never


class CertificateSettings(Strict):
    """A client's certificate, by a name in it: its common name, or a DNS name or URI of its subjectAltName."""

    subject: Annotated[str, Field(min_length=1)]
    role: Role = Role.GENERATE


class LimitSettings(Strict):
    """What a tenant may use. None: no limit."""

    requests_per_s: Positive | None = None
    tokens_per_s: Positive | None = None  # of prompts and outputs together
    burst_s: Positive = 10.0  # so many seconds' worth may be used at once
    streams: Count | None = None  # generations at the same time
    queued_requests: Count | None = None
    queued_tokens: Count | None = None  # of prompts that wait
    adapter_bytes: Size | None = None  # of adapters in the pool
    upload_bytes: Size | None = None  # of uploaded adapters that are kept


class TenantSettings(Strict):
    """A customer."""

    weight: Positive = 1.0  # its share of the machine when there is not enough for all, relative to the others'
    adapters: tuple[str, ...] | None = None  # globs of names that are its own; None: those that begin with "NAME/"
    tokens: tuple[TokenSettings, ...] = ()
    certificates: tuple[CertificateSettings, ...] = ()
    limits: LimitSettings = LimitSettings()


class JwtSettings(Strict):
    """Who is believed to have signed a JSON Web Token, and which of its claims name tenant and role."""

    issuer: str
    audience: str
    jwks_file: Path
    tenant_claim: str = "tenant"
    role_claim: str = "role"
    leeway_s: Annotated[float, Field(ge=0)] = 30.0


class TenancySettings(Strict):
    """All of it. With no tenants, no tokens and no `jwt` everybody may do everything."""

    tenants: dict[Name, TenantSettings] = {}
    admin_tokens: tuple[TokenSettings, ...] = ()  # of no tenant; their role is admin, whatever they say
    jwt: JwtSettings | None = None
    public_adapters: tuple[str, ...] = ()  # globs of names that every tenant may use, and whose prefixes all share
    public_base_model: bool = True  # every tenant may use the base model by itself; its prefixes are shared by none
