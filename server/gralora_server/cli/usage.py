"""`gralora usage`: what tenants used of a server, by adapter."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from gralora_server.cli.options import Json
from gralora_server.cli.output import print_json, stdout
from gralora_server.cli.remote import needs_server

if TYPE_CHECKING:
    from gralora_server.client import Client


@needs_server
def usage(
    client: Client,
    *,
    tenant: Annotated[str | None, typer.Option(help="Only of this one; '' is the operator. Default: all.")] = None,
    json: Json = False,
) -> None:
    """Show what tenants used so far, by adapter: requests, tokens, refusals and uploaded bytes."""
    from gralora_server.client import TenantUsage

    rows = [asdict(row) for row in client.usage(tenant)]
    if json:
        print_json({"usage": rows})
        return
    table = Table(box=None)
    for field in fields(TenantUsage):
        table.add_column(field.name.replace("_", " "), justify="left" if field.type == "str" else "right")
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row.values()))
    stdout().print(table)
