"""Schemas that others wrote: those of the JSON Schema Store and of Kubernetes, as two packages bring them.

The first package keeps responses of web servers in a database, as pickles. Nothing is unpickled here: a response's
body is the bytes that follow its name.
"""

from __future__ import annotations

import json
import pickletools
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

KUBERNETES = "kubernetes-json-schema/v1.35.0-local"  # below its package
DEFINITIONS = "_definitions.json"
BODY = "_content"


class MissingError(Exception):
    """A package is not installed."""


def public_schemas(count: int) -> dict[str, str]:
    """Texts of schemas by name: all of the store, then as many of Kubernetes as make up `count`, always the same ones.

    Raises MissingError.
    """
    found = dict(_of_the_store())
    for name, text in _of_kubernetes():
        if len(found) >= count:
            break
        found[name] = text
    return dict(list(found.items())[:count])


def _of_the_store() -> Iterator[tuple[str, str]]:
    place = _package("schemastore") / "cache.sqlite"
    with closing(sqlite3.connect(f"file:{place}?mode=ro&immutable=1", uri=True)) as database:
        for key, pickled in database.execute("SELECT key, value FROM responses ORDER BY key"):
            with suppress(ValueError):  # pages that are no JSON
                found = json.loads(_body(pickled))
                if _is_schema(found):
                    yield f"store/{key}", json.dumps(found)


def _body(pickled: bytes) -> bytes:
    is_next = False
    for _, argument, _ in pickletools.genops(pickled):
        if is_next and isinstance(argument, bytes):
            return argument
        is_next = is_next or argument == BODY
    return b""


def _is_schema(found: object) -> bool:
    """The catalogue of all of them is none."""
    return isinstance(found, dict) and not {"properties", "type", "$ref", "anyOf", "oneOf", "allOf"}.isdisjoint(found)


def _of_kubernetes() -> Iterator[tuple[str, str]]:
    """Each by itself, with the definitions that it needs inside."""
    folder = _package("kubernetes_validate") / KUBERNETES
    definitions = json.loads((folder / DEFINITIONS).read_text())["$defs"]
    for name in sorted(definitions):
        needed = _needed(name, definitions)
        whole = {"$ref": f"#/$defs/{name}", "$defs": {one: definitions[one] for one in sorted(needed)}}
        yield f"kubernetes/{name}", json.dumps(whole)


def _needed(name: str, definitions: dict[str, Any]) -> set[str]:
    """All that it refers to, itself as well."""
    found, left = set(), [name]
    while left:
        one = left.pop()
        if one not in found:
            found.add(one)
            left += _references(definitions[one])
    return found


def _references(schema: object) -> Iterator[str]:
    match schema:
        case dict():
            if isinstance(reference := schema.get("$ref"), str):
                yield reference.rpartition("/")[2]
            for inner in schema.values():
                yield from _references(inner)
        case list():
            for inner in schema:
                yield from _references(inner)


def _package(name: str) -> Path:
    spec = find_spec(name)  # without importing it: the first one's import needs what nobody else does
    if spec is None or spec.origin is None:
        raise MissingError(f"{name} is not installed")
    return Path(spec.origin).parent
