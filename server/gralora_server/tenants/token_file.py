"""The file of `--token-file`: the operator's own tokens. Keeps their hashes alone.

It has one token a line, optionally followed by what it is for: `generate` may do everything but change adapters,
`admin` (or nothing) may do everything. Empty lines and lines that begin with # are skipped.
"""

from __future__ import annotations

from pathlib import Path

from gralora_runtime.errors import ConfigError
from gralora_server.tenants.caller import Caller
from gralora_server.tenants.opaque_tokens import MIN_SECRET_CHARS, OpaqueToken, digest_of
from gralora_server.tenants.settings import Role

_ROLES = {"admin": Role.ADMIN, "generate": Role.GENERATE}


def read_token_file(path: Path) -> tuple[OpaqueToken, ...]:
    """Raises ConfigError when the file cannot be meant."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as cause:  # its text is no UTF-8, or its name one that no file has
        raise ConfigError(f"the token file {str(path)!r} cannot be read: {cause}") from cause
    words = [(number, line.split()) for number, line in enumerate(lines, 1)]
    tokens = [_parse(path, number, line) for number, line in words if line and not line[0].startswith("#")]
    if not tokens:
        raise ConfigError(f"the token file {str(path)!r} has no token")
    return tuple(tokens)


def _parse(path: Path, number: int, words: list[str]) -> OpaqueToken:
    """The message names the line but never repeats it: it goes to a log."""
    secret, scope = words[0], words[1] if len(words) > 1 else "admin"
    if len(words) > 2 or scope not in _ROLES:
        raise ConfigError(f"{path}:{number}: expected a token, optionally followed by admin or generate")
    if len(secret) < MIN_SECRET_CHARS:
        raise ConfigError(f"{path}:{number}: a token must have at least {MIN_SECRET_CHARS} characters")
    return OpaqueToken(digest=digest_of(secret), caller=Caller("", _ROLES[scope]))
