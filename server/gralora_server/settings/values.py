"""Values as an operator writes them, wherever he does: what a text means, and what is wrong with it."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema

from gralora_runtime.config import DEVICES, DTYPES, KERNEL_BACKENDS, PIPELINES, WATCHES, WEIGHTS, AdapterSource

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("human", "json")

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def parse_bytes(text: Any) -> int:
    """ "512MiB", "2g" or a plain number. Units are powers of 1024."""
    match = _BYTES.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size (examples: 1073741824, 512MiB, 2g)")
    num_bytes = float(match[1]) * _UNITS[match[2].lower()]
    if math.isinf(num_bytes):
        raise ValueError(f"{str(text)[:20]!r}... is more than any size")
    return int(num_bytes)


def parse_graphs(given: Any) -> tuple[int, ...] | None:
    """`EngineConfig.cuda_graphs` of "on", "off" or numbers of rows, in a text or a list."""
    words = ",".join(map(str, given)) if isinstance(given, list | tuple) else str(given).strip().lower()
    if words in ("on", "off"):
        return None if words == "on" else ()
    try:
        return tuple(sorted({int(number) for number in words.split(",")}))
    except ValueError:
        raise ValueError(f"{given!r} is not on, off or numbers of rows (example: 1,2,4,8,16)") from None


def write_graphs(rows: tuple[int, ...] | None) -> str:
    """What `parse_graphs` reads."""
    return "on" if rows is None else ",".join(map(str, rows)) or "off"


def parse_source(text: Any) -> AdapterSource:
    """SOURCE, or SOURCE,hold for one whose new content waits for a promotion."""
    uri, _, policy = str(text).partition(",")
    if policy not in ("", "hold") or not uri:
        raise ValueError(f"{text!r} is not SOURCE or SOURCE,hold")
    return AdapterSource(uri, follows=policy != "hold")


def write_source(source: AdapterSource) -> str:
    """What `parse_source` reads."""
    return source.uri if source.follows else f"{source.uri},hold"


def parse_address(address: str) -> tuple[str, int]:
    """HOST:PORT, with an IPv6 host in brackets."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or (":" in host and not host.startswith("[")):
        raise ValueError(f"{address!r} is not HOST:PORT (examples: 127.0.0.1:50051, 0.0.0.0:0, [::1]:50051)")
    if int(port) > 65535:
        raise ValueError(f"{address!r}: a port is at most 65535")
    return host, int(port)


def default_of(config: type[Any], name: str) -> Any:
    """The default that a configuration's field has: it is stated in one place."""
    return next(field.default for field in fields(config) if field.name == name)


def _checked_address(address: str) -> str:
    parse_address(address)
    return address


def _one_of(allowed: tuple[str, ...], word: str) -> str:
    if word not in allowed:
        raise ValueError(f"must be one of {', '.join(allowed)}, got {word!r}")
    return word


Address = Annotated[str, AfterValidator(_checked_address), Field(json_schema_extra={"format": "HOST:PORT"})]
Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}], "format": "BYTES"}),
]
Graphs = Annotated[
    tuple[int, ...] | None,
    PlainValidator(parse_graphs),
    PlainSerializer(write_graphs, when_used="json"),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}], "format": "on|off|ROWS,..."}
    ),
]
Source = Annotated[
    AdapterSource,
    PlainValidator(parse_source),
    PlainSerializer(write_source, when_used="json"),
    WithJsonSchema({"type": "string", "format": "SOURCE[,hold]"}),
]
Device = Annotated[str, AfterValidator(partial(_one_of, DEVICES)), Field(json_schema_extra={"enum": [*DEVICES]})]
Dtype = Annotated[str, AfterValidator(partial(_one_of, DTYPES)), Field(json_schema_extra={"enum": [*DTYPES]})]
Weights = Annotated[str, AfterValidator(partial(_one_of, WEIGHTS)), Field(json_schema_extra={"enum": [*WEIGHTS]})]
Watch = Annotated[str, AfterValidator(partial(_one_of, WATCHES)), Field(json_schema_extra={"enum": [*WATCHES]})]
Pipeline = Annotated[str, AfterValidator(partial(_one_of, PIPELINES)), Field(json_schema_extra={"enum": [*PIPELINES]})]
KernelBackend = Annotated[
    str, AfterValidator(partial(_one_of, KERNEL_BACKENDS)), Field(json_schema_extra={"enum": [*KERNEL_BACKENDS]})
]
LogFormat = Annotated[
    str, AfterValidator(partial(_one_of, LOG_FORMATS)), Field(json_schema_extra={"enum": [*LOG_FORMATS]})
]
LogLevel = Annotated[
    str, AfterValidator(partial(_one_of, LOG_LEVELS)), Field(json_schema_extra={"enum": [*LOG_LEVELS]})
]
