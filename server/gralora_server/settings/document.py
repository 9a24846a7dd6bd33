"""The file as it was read: what its TOML says, and where each key stands. Knows nothing of what the keys mean."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gralora_server.errors import ConfigInvalidError
from gralora_server.settings.lines import Keys, lines_of

_WHERE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Document:
    """`values` is all that the file says."""

    path: Path
    values: dict[str, Any]
    lines: Mapping[Keys, int]

    def place(self, keys: Keys) -> str:
        """FILE:LINE of a key; if the file lacks it, of the table that it would be in."""
        line = self.line(keys)
        return f"{self.path}:{line}" if line else str(self.path)

    def line(self, keys: Keys) -> int:
        """0: the file has neither the key nor a table that it would be in."""
        return next((self.lines[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in self.lines), 0)

    def has(self, keys: Keys) -> bool:
        return keys in self.lines


def read(path: Path) -> Document:
    """Raises `ConfigInvalidError`."""
    try:
        text = path.read_bytes().decode()
        values = tomllib.loads(text)
        lines = lines_of(text)
    except OSError as cause:
        raise ConfigInvalidError([f"{path} cannot be read: {cause.strerror}"]) from cause
    except UnicodeDecodeError as cause:
        raise ConfigInvalidError([f"{path} is not UTF-8: {cause.reason} at byte {cause.start}"]) from cause
    except tomllib.TOMLDecodeError as cause:
        raise ConfigInvalidError([_syntax(path, text, str(cause))]) from cause
    except ValueError as cause:  # tomllib lets Python's own limit through
        raise ConfigInvalidError([f"{path} has a number of too many digits"]) from cause
    except RecursionError as cause:
        raise ConfigInvalidError([f"{path} has arrays or tables that are nested too deeply"]) from cause
    return Document(path, values, lines)


def dotted(keys: Keys) -> str:
    """As an operator reads it: tenants.acme.tokens[0].role."""
    text = ""
    for key in keys:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += ("." if text else "") + (key if _PLAIN_KEY.fullmatch(key) else repr(key))
    return text


def _syntax(path: Path, text: str, complaint: str) -> str:
    """The parser says the line in words, at the end of its complaint."""
    match = _WHERE.search(complaint)
    line = match[1] if match is not None and match[1] else text.rstrip().count("\n") + 1
    return f"{path}:{line}: this is not TOML: {_WHERE.sub('', complaint)}"
