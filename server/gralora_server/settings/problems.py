"""What pydantic found wrong, in words for an operator: the place, the key, what is allowed, and what is written there,
unless that is or may be a secret.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gralora_runtime.adapters.catalogue.similar import similar_name
from gralora_server.settings.document import Document, dotted
from gralora_server.settings.lines import Keys
from gralora_server.settings.sections import Settings
from gralora_server.settings.table import SETTINGS

# Below these a key's value is shown only if it is listed: an operator may have put a token where its hash belongs.
_SECRET = frozenset({"tokens", "admin_tokens", "hub_token"})
_SHOWN = frozenset({"role", "expires"})
MAX_SHOWN_CHARS = 80


def problems_of(error: ValidationError, document: Document) -> list[str]:
    """Of a whole file, from its top to its end."""
    found = sorted(error.errors(), key=lambda one: document.line(_keys(one)))
    return [_of_file(one, document) for one in found]


def complaint(found: ErrorDetails, keys: Keys) -> str:
    """What is wrong with a value, without saying where it is."""
    if found["type"] == "value_error":  # ours, which names the value itself
        return str(found["ctx"]["error"])
    if found["type"] == "missing":
        return "is missing"
    return found["msg"].removeprefix("Input ").removeprefix("String ") + _given(found["input"], keys)


def is_secret(keys: Keys) -> bool:
    return not _SECRET.isdisjoint(keys) and keys[-1] not in _SHOWN


def _keys(found: ErrorDetails) -> Keys:
    return tuple(key for key in found["loc"] if key != "[key]")  # pydantic's mark of a name that is not allowed


def _of_file(found: ErrorDetails, document: Document) -> str:
    keys = _keys(found)
    if found["type"] == "extra_forbidden":
        return f"{document.place(keys)}: there is no setting {dotted(keys)}{_meant(keys)}"
    return f"{document.place(keys)}: {dotted(keys)} {complaint(found, keys)}"


def _given(value: Any, keys: Keys) -> str:
    if isinstance(value, dict | list) or is_secret(keys):
        return ""
    shown = repr(value)
    return f", got {shown if len(shown) <= MAX_SHOWN_CHARS else shown[: MAX_SHOWN_CHARS - 3] + '...'}"


def _meant(keys: Keys) -> str:
    *above, name = keys
    known = list(_fields_at(tuple(above)))
    near = similar_name(str(name), known)
    if near:
        return f"; did you mean {dotted((*above, near))}?"
    elsewhere = next((setting.key for setting in SETTINGS if setting.name == name), "")
    if elsewhere:
        return f"; did you mean {elsewhere}?"
    return f"; there are {', '.join(known)}" if known else ""


def _fields_at(keys: Keys) -> Iterator[str]:
    """The names that the model has in a table of the file."""
    kinds: list[Any] = [Settings]
    for key in keys:
        kinds = [inner for kind in kinds for inner in _below(kind, key)]
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from kind.model_fields


def _below(kind: Any, key: str | int) -> tuple[Any, ...]:
    """The types that a key of a value of this type may have."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(key))
        return () if field is None else (field.annotation, *_arguments(field.annotation))
    return _arguments(kind)


def _arguments(kind: Any) -> tuple[Any, ...]:
    return tuple(getattr(kind, "__args__", ()))
