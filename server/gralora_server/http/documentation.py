"""The endpoints as OpenAPI, and as a page that needs nothing from elsewhere. Reads what they say of themselves."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from pydantic.json_schema import models_json_schema

from gralora_server.http.answering import Json
from gralora_server.http.calls import OPEN, Endpoint
from gralora_server.json_values import Whole

TITLE = "GraLoRA server"
_REFERENCES = "#/components/schemas/{model}"


def schema(endpoints: Sequence[Endpoint]) -> Json:
    """An OpenAPI 3.1 document."""
    kinds = _kinds(endpoints)
    _, schemas = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REFERENCES)
    paths: dict[str, Json] = {}
    for endpoint in endpoints:
        paths.setdefault(_plain(endpoint.path), {})[endpoint.verb.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {"title": TITLE, "version": version("gralora-server")},
        "paths": paths,
        "components": {
            "schemas": schemas.get("$defs", {}),
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def page(endpoints: Sequence[Endpoint]) -> str:
    """What there is, and what each body may hold."""
    rows = "".join(
        f"<tr><td><code>{endpoint.verb}</code><td><code>{html.escape(_plain(endpoint.path))}</code>"
        f"<td>{html.escape(endpoint.says)}{_link(endpoint)}"
        for endpoint in endpoints
    )
    bodies = "".join(_section(kind) for kind in _kinds(endpoints))
    style = "body{font:16px sans-serif;max-width:60em;margin:2em auto}td{padding:.3em 1em .3em 0;vertical-align:top}"
    return (
        f"<!doctype html><meta charset=utf-8><title>{TITLE}</title><style>{style}</style><h1>{TITLE}</h1>"
        '<p>As OpenAPI: <a href=openapi.json>openapi.json</a>. Errors are <code>{"error": {"message", "type", '
        '"param", "code"}}</code>; <code>code</code> is the reason that gRPC tells, too. Headers that are read: '
        "<code>Authorization: Bearer TOKEN</code>, <code>X-Request-Id</code> (sent again, the same answer), "
        "<code>X-Request-Timeout</code> (seconds)."
        f"<table>{rows}</table>{bodies}"
    )


def _kinds(endpoints: Sequence[Endpoint]) -> list[type[Whole]]:
    return list(dict.fromkeys(endpoint.body for endpoint in endpoints if endpoint.body is not None))


def _operation(endpoint: Endpoint) -> Json:
    operation: Json = {
        "summary": endpoint.says,
        "operationId": f"{endpoint.verb.lower()}{_plain(endpoint.path)}",
        "responses": {"200": {"description": "Done."}, "default": {"description": "An error, as OpenAI tells it."}},
    }
    if endpoint.rpc != OPEN:
        operation["security"] = [{"bearer": []}]
    if names := re.findall(r"{(\w+)", endpoint.path):
        schema: Json = {"in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [{"name": name} | schema for name in names]
    if endpoint.body is not None:
        reference = {"$ref": _REFERENCES.format(model=endpoint.body.__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    return operation


def _section(kind: type[Whole]) -> str:
    heading = f"<h2 id={kind.__name__}>{kind.__name__}</h2><p>{html.escape(kind.__doc__ or '')}"
    return f"{heading}<table>{''.join(_fields(kind))}</table>"


def _fields(kind: type[Whole]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        default = "" if field.is_required() else f"{field.default!r}"
        cells = (f"<code>{name}</code>", html.escape(default), html.escape(field.description or ""))
        yield "<tr>" + "".join(f"<td>{cell}" for cell in cells)


def _link(endpoint: Endpoint) -> str:
    return "" if endpoint.body is None else f" <a href=#{endpoint.body.__name__}>Body</a>"


def _plain(path: str) -> str:
    return path.replace(":path}", "}")
