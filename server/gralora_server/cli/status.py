"""`gralora status`: what a server serves and how busy it is."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from gralora_server.cli.options import Json
from gralora_server.cli.output import print_json, stdout
from gralora_server.cli.remote import needs_server

if TYPE_CHECKING:
    from gralora_server.client import Client


@needs_server
def status(client: Client, *, json: Json = False) -> None:
    """Show what the server serves and how busy it is."""
    info, load = client.info(), client.load()
    if json:
        print_json({"info": asdict(info), "load": asdict(load)})
        return
    table = Table(show_header=False, box=None)
    for name, value in (asdict(info) | asdict(load)).items():
        table.add_row(name.replace("_", " "), Text(str(value)))
    stdout().print(table)
