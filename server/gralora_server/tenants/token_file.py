"""Bearer tokens: who may call what. Knows no transport beyond the name of a method.

The file has one token a line, optionally followed by what it is for: `generate` may do everything but change adapters,
`admin` (or nothing) may do everything. Empty lines and lines that begin with # are skipped.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from pathlib import Path

from gralora_runtime.errors import ConfigError
from gralora_server.errors import PermissionDeniedError, UnauthenticatedError

ADMIN_METHODS = frozenset(
    f"/gralora.v1.AdapterService/{method}"
    for method in (
        "LoadAdapter",
        "UploadAdapter",
        "GetAdapterUpload",
        "UnloadAdapter",
        "PinAdapter",
        "PromoteAdapter",
        "RollbackAdapter",
        "SetAdapterCanary",
    )
)
MIN_TOKEN_CHARS = 16


@dataclass(frozen=True, slots=True)
class _Token:
    secret: bytes
    is_admin: bool


class Tokens:
    """The tokens of one file, read once."""

    def __init__(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as cause:
            raise ConfigError(f"the token file {str(path)!r} cannot be read: {cause}") from cause
        words = [(number, line.split()) for number, line in enumerate(lines, 1)]
        self._tokens = [_parse(path, number, line) for number, line in words if line and not line[0].startswith("#")]
        if not self._tokens:
            raise ConfigError(f"the token file {str(path)!r} has no token")

    def authorize(self, method: str, authorization: str) -> None:
        scheme, _, secret = authorization.partition(" ")
        given = secret.strip().encode()
        # Every token is compared, in constant time each, so that the time tells nothing about any of them.
        matches = [token for token in self._tokens if hmac.compare_digest(token.secret, given)]
        if scheme.lower() != "bearer" or not matches:
            raise UnauthenticatedError
        if method in ADMIN_METHODS and not any(token.is_admin for token in matches):
            raise PermissionDeniedError(method)


def _parse(path: Path, number: int, words: list[str]) -> _Token:
    """The message names the line but never repeats it: it goes to a log."""
    secret, scope = words[0], words[1] if len(words) > 1 else "admin"
    if len(words) > 2 or scope not in ("admin", "generate"):
        raise ConfigError(f"{path}:{number}: expected a token, optionally followed by admin or generate")
    if len(secret) < MIN_TOKEN_CHARS:
        raise ConfigError(f"{path}:{number}: a token must have at least {MIN_TOKEN_CHARS} characters")
    return _Token(secret.encode(), scope == "admin")
