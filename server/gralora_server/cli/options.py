"""Options that several commands share, and the parsers of their values. Each says its default by asking its owner."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Annotated, Any

import typer

from gralora_runtime.config import AdapterSource
from gralora_server.cli.output import CommandError, ExitCode

DEFAULT_ADDRESS = "127.0.0.1:50051"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def parse_bytes(text: Any) -> int:
    """ "512MiB", "2g" or a plain number. Units are powers of 1024."""
    match = _BYTES.fullmatch(str(text).strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size (examples: 1073741824, 512MiB, 2g)")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_graphs(text: Any) -> tuple[int, ...] | None:
    """`EngineConfig.cuda_graphs` of "on", "off" or numbers of rows."""
    words = str(text).strip().lower()
    if words in ("on", "off"):
        return None if words == "on" else ()
    try:
        return tuple(sorted({int(number) for number in words.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not on, off or numbers of rows (example: 1,2,4,8,16)") from None


def parse_source(text: str) -> AdapterSource:
    """SOURCE, or SOURCE,hold for one whose new content waits for a promotion."""
    uri, _, policy = text.partition(",")
    if policy not in ("", "hold") or not uri:
        raise CommandError(ExitCode.USAGE, f"--adapters {text!r} is not SOURCE or SOURCE,hold")
    return AdapterSource(uri, follows=policy != "hold")


def parse_address(address: str) -> tuple[str, int]:
    """HOST:PORT, with an IPv6 host in brackets."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or (":" in host and not host.startswith("[")):
        raise typer.BadParameter(f"{address!r} is not HOST:PORT (examples: {DEFAULT_ADDRESS}, 0.0.0.0:0, [::1]:50051)")
    return host, int(port)


def default_of(config: type[Any], name: str) -> Any:
    """The default that a configuration's field has: `--help` shows it, and it is stated in one place."""
    return next(field.default for field in fields(config) if field.name == name)
