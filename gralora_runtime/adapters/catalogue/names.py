"""Which strings may name an adapter, and which paths may hold one. Knows neither checkpoints nor the catalogue."""

from __future__ import annotations

import re
from pathlib import Path

from gralora_runtime.errors import InvalidRequestError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NAME_RULE = "must be 1 to 128 letters, digits, '.', '_' or '-', and begin with a letter or a digit"


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def check_name(field: str, name: str) -> None:
    """Names become path components, metric labels and log fields, so nothing else gets through."""
    if not is_name(name):
        raise InvalidRequestError(field, name, _NAME_RULE)


def resolve_inside(root: Path | None, path: Path) -> Path | None:
    """`path` with every link followed; None: that is outside of `root`, if there is one, or links go in a circle."""
    try:
        resolved = path.resolve()
        return resolved if root is None or resolved.is_relative_to(root.resolve()) else None
    except (OSError, RuntimeError):
        return None


def resolve_source(root: Path | None, path: Path) -> Path:
    """The directory that `path` names below `root`: where the operator keeps adapters, and nowhere else."""
    if root is None:
        raise InvalidRequestError("path", str(path), "the server was started without an adapters directory")
    if "\0" in str(path):
        raise InvalidRequestError("path", str(path), "contains a NUL character")
    source = resolve_inside(root, root / path)
    if source is None:
        raise InvalidRequestError("path", str(path), "leaves the adapters directory")
    return source
