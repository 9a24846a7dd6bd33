"""Options that several commands share, and the parsers of their values: what is wrong with one is a wrong option."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from gralora_server.settings import values

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def parse_bytes(text: Any) -> int:
    """ "512MiB", "2g" or a plain number. Units are powers of 1024."""
    with _usage():
        return values.parse_bytes(text)


def parse_address(address: str) -> tuple[str, int]:
    """HOST:PORT, with an IPv6 host in brackets."""
    with _usage():
        return values.parse_address(address)


@contextmanager
def _usage() -> Iterator[None]:
    try:
        yield
    except ValueError as cause:
        raise typer.BadParameter(str(cause)) from None
