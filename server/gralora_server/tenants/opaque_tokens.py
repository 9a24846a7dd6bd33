"""Bearer tokens that mean nothing by themselves: who each belongs to, found by its hash. Knows no secret."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from gralora_runtime.errors import ConfigError
from gralora_server.tenants.caller import Caller
from gralora_server.tenants.roles import rank

MIN_SECRET_CHARS = 16  # a hash hides only what nobody can guess


@dataclass(frozen=True, slots=True, kw_only=True)
class OpaqueToken:
    """What is kept of a token."""

    digest: bytes
    caller: Caller
    expires: datetime | None = None  # without a time zone: UTC


def utc_now() -> datetime:
    return datetime.now(UTC)


def digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


class OpaqueTokens:
    """All tokens of a server. One that several lines name has the highest of their roles."""

    def __init__(self, tokens: Iterable[OpaqueToken], now: Callable[[], datetime] = utc_now) -> None:
        self._tokens = tuple(tokens)
        self._now = now
        owners: dict[bytes, str] = {}
        for token in self._tokens:
            owner, other = owners.setdefault(token.digest, token.caller.tenant), token.caller.tenant
            if owner != other:
                hidden = token.digest.hex()[:12]
                raise ConfigError(f"the token with sha256 {hidden}... is given to two tenants: {owner!r} and {other!r}")

    def __len__(self) -> int:
        return len(self._tokens)

    def caller(self, secret: str) -> Caller | None:
        """None: it is not ours, or not any more."""
        given, now = digest_of(secret), self._now()
        # Every one is compared, in constant time each, so that the time tells nothing about any of them.
        matches = [token for token in self._tokens if hmac.compare_digest(token.digest, given)]
        callers = [token.caller for token in matches if token.expires is None or now < _aware(token.expires)]
        return max(callers, key=lambda caller: rank(caller.role), default=None)


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
