"""Credentials to callers, by one reading of the settings: bearer tokens, web tokens, certificates. Changes never."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

from gralora_server.errors import UnauthenticatedError
from gralora_server.tenants.caller import ANYBODY, Caller
from gralora_server.tenants.certificates import Certificates
from gralora_server.tenants.opaque_tokens import OpaqueToken, OpaqueTokens, utc_now
from gralora_server.tenants.settings import Role, TenancySettings, TokenSettings
from gralora_server.tenants.token_file import read_token_file
from gralora_server.tenants.web_tokens import WebTokens


class Identities:
    """Whoever shows nothing that is known is refused, with the same words whatever was wrong."""

    def __init__(
        self,
        settings: TenancySettings,
        *,
        token_file: Path | None = None,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        """Reads the token file and the JWKS file; raises ConfigError."""
        self._settings = settings
        listed = () if token_file is None else read_token_file(token_file)
        self._tokens = OpaqueTokens((*_tokens(settings), *listed), now)
        self._certificates = Certificates(_subjects(settings))
        self._web_tokens = None if settings.jwt is None else WebTokens(settings.jwt, self._web_caller)

    @property
    def is_open(self) -> bool:
        """Nobody has said who may call, so that anybody may."""
        return not (self._settings.tenants or self._tokens or self._web_tokens)

    @property
    def reads_certificates(self) -> bool:
        return len(self._certificates) > 0

    def by_authorization(self, authorization: str) -> Caller:
        """By what a call says in its metadata, "" if it says nothing."""
        if self.is_open:
            return ANYBODY
        scheme, _, secret = authorization.partition(" ")
        caller = self._bearer(secret.strip()) if scheme.lower() == "bearer" else None
        if caller is None:
            raise UnauthenticatedError
        return caller

    def by_certificate(self, peer: Mapping[str, Iterable[bytes]]) -> Caller:
        """By what gRPC says of the peer."""
        caller = self._certificates.caller(peer)
        if caller is None:
            raise UnauthenticatedError
        return caller

    def _bearer(self, secret: str) -> Caller | None:
        caller = self._tokens.caller(secret)  # first, as an operator's own token may have dots in it, too
        if caller is None and self._web_tokens is not None and secret.count(".") == 2:
            return self._web_tokens.caller(secret)
        return caller

    def _web_caller(self, tenant: str, role: Role) -> Caller | None:
        found = self._settings.tenants.get(tenant)
        if found is None and tenant:
            return None
        return Caller(tenant, role, found.weight if found else 1.0)


def _tokens(settings: TenancySettings) -> Iterator[OpaqueToken]:
    for name, tenant in settings.tenants.items():
        yield from (_token(token, Caller(name, token.role, tenant.weight)) for token in tenant.tokens)
    yield from (_token(token, Caller("", Role.ADMIN)) for token in settings.admin_tokens)


def _token(token: TokenSettings, caller: Caller) -> OpaqueToken:
    return OpaqueToken(digest=bytes.fromhex(token.sha256), caller=caller, expires=token.expires)


def _subjects(settings: TenancySettings) -> Iterator[tuple[str, Caller]]:
    for name, tenant in settings.tenants.items():
        for certificate in tenant.certificates:
            yield certificate.subject, Caller(name, certificate.role, tenant.weight)
