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


def escapes(root: Path, path: Path) -> bool:
    """Whether `path`, with every link followed, lies outside of `root`."""
    try:
        return not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return True


def resolve_source(root: Path | None, path: Path) -> Path:
    """The directory that `path` names below `root`: where the operator keeps adapters, and nowhere else."""
    if root is None:
        raise InvalidRequestError("path", str(path), "the server was started without an adapters directory")
    if "\0" in str(path):
        raise InvalidRequestError("path", str(path), "contains a NUL character")
    source = root / path
    if escapes(root, source):
        raise InvalidRequestError("path", str(path), "leaves the adapters directory")
    return source.resolve()
