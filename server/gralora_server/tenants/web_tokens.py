"""JSON Web Tokens of one issuer: are they signed by one of its keys, for us, now, and for whom. Knows no transport.

Only signatures that somebody else cannot make are believed: a key that both sides share is refused when keys are read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt

from gralora_runtime.errors import ConfigError
from gralora_server.tenants.caller import Caller
from gralora_server.tenants.settings import JwtSettings, Role

# By key type and curve: what a key of that kind may have signed.
_ALGORITHMS = {
    ("RSA", None): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
    ("OKP", "Ed448"): ("EdDSA",),
}
_MIN_RSA_BITS = 2048

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Key:
    public: Any  # what it is depends on its kind
    algorithms: tuple[str, ...]


class WebTokens:
    """The keys of one file, read once. Raises ConfigError when one of them cannot be meant."""

    def __init__(self, settings: JwtSettings, caller_of: Callable[[str, Role], Caller | None]) -> None:
        """`caller_of`: None for a tenant that there is not. The operator's tenant is ""."""
        self._settings = settings
        self._caller_of = caller_of
        self._keys = _read(settings.jwks_file)

    def caller(self, token: str) -> Caller | None:
        """None, whatever is wrong with it."""
        try:
            claims = self._verified(token)
        except (jwt.PyJWTError, KeyError, ValueError, OverflowError, RecursionError) as error:
            _log.debug("a web token was refused: %s", type(error).__name__)
            return None
        return self._caller(claims)

    def _verified(self, token: str) -> Mapping[str, Any]:
        settings, key = self._settings, self._keys[jwt.get_unverified_header(token)["kid"]]
        claims: Mapping[str, Any] = jwt.decode(
            token,
            key=key.public,
            algorithms=key.algorithms,
            audience=settings.audience,
            issuer=settings.issuer,
            leeway=settings.leeway_s,
            options={"require": ["exp", "iss", "aud"]},
        )
        return claims

    def _caller(self, claims: Mapping[str, Any]) -> Caller | None:
        tenant, role = claims.get(self._settings.tenant_claim), claims.get(self._settings.role_claim)
        if not isinstance(role, str) or role not in set(Role):
            return None
        if tenant is None and role == Role.ADMIN:
            return self._caller_of("", Role.ADMIN)
        return self._caller_of(tenant, Role(role)) if isinstance(tenant, str) and tenant else None


def _read(path: Path) -> dict[str, _Key]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as cause:
        raise ConfigError(f"the JWKS file {str(path)!r} cannot be read: {cause}") from cause
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"the JWKS file {str(path)!r} is not an object with a list of objects, 'keys'")
    keys: dict[str, _Key] = {}
    for entry in entries:
        if entry.get("use", "sig") == "sig":
            _add(keys, entry, path)
    if not keys:
        raise ConfigError(f"the JWKS file {str(path)!r} has no key for signatures")
    return keys


def _add(keys: dict[str, _Key], entry: Mapping[str, Any], path: Path) -> None:
    """The messages name the key, and never repeat what it is: a private one may be there by mistake."""
    kid = entry.get("kid")
    if not isinstance(kid, str) or kid in keys:
        raise ConfigError(f"{path}: each key needs a 'kid' of its own (got {str(kid)[:80]!r})")
    allowed = _ALGORITHMS.get((_word(entry, "kty"), _word(entry, "crv") or None), ())
    if "alg" in entry:
        allowed = tuple(name for name in allowed if name == entry["alg"])
    if not allowed:
        raise ConfigError(
            f"{path}: key {kid!r} is of no kind that is believed: RSA, EC or OKP, and not a shared secret"
        )
    if "d" in entry:
        raise ConfigError(f"{path}: key {kid!r} is a private one: only public ones belong here")
    try:
        public = jwt.PyJWK.from_dict(dict(entry), algorithm=allowed[0]).key
    except (jwt.PyJWTError, ValueError, TypeError) as cause:
        raise ConfigError(f"{path}: key {kid!r} cannot be read: {type(cause).__name__}") from cause
    if entry["kty"] == "RSA" and public.key_size < _MIN_RSA_BITS:
        raise ConfigError(f"{path}: key {kid!r} has {public.key_size} bits: at least {_MIN_RSA_BITS} are needed")
    keys[kid] = _Key(public, allowed)


def _word(entry: Mapping[str, Any], field: str) -> str:
    value = entry.get(field, "")
    return value if isinstance(value, str) else ""
