"""`gralora config`: what a configuration file says, whether it may, and putting it in force in a running server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from gralora_server.cli.options import Json
from gralora_server.cli.output import ExitCode, print_error, print_json, stdout
from gralora_server.cli.remote import needs_server
from gralora_server.cli.setting_options import ConfigArgument, takes_settings
from gralora_server.errors import ConfigInvalidError
from gralora_server.settings import writing
from gralora_server.settings.layers import Layers
from gralora_server.settings.sections import Settings

if TYPE_CHECKING:
    from gralora_server.client import Client

app = typer.Typer(no_args_is_help=True, help="Check, show and reload the server's configuration.")


@app.command("check")
def check(file: Annotated[Path, typer.Argument(help="A TOML file.")], json: Json = False) -> ExitCode:
    """Say all that is wrong with a configuration file, by itself: neither options nor variables are looked at."""
    problems: tuple[str, ...] = ()
    try:
        Layers(file, {}, {}).read()
    except ConfigInvalidError as error:
        problems = error.problems
    if json:
        print_json({"file": file, "problems": problems})
    elif not problems:
        stdout().print(f"{file}: nothing is wrong with it", markup=False, soft_wrap=True)
    else:
        for problem in problems:
            print_error(problem)
    return ExitCode.USAGE if problems else ExitCode.OK


@app.command("show")
@takes_settings(ConfigArgument)
def show(layers: Layers, *, json: Json = False) -> None:
    """Show what `gralora serve` would run with, given the same file, variables and options, and who says so.

    Secrets are not shown.
    """
    rows = list(writing.in_force(layers.read()))
    if json:
        print_json({"settings": [{"key": key, "value": value, "from": origin} for key, value, origin in rows]})
        return
    table = Table(box=None)
    for heading in ("setting", "value", "from"):
        table.add_column(heading, overflow="fold")
    for key, value, origin in rows:
        table.add_row(Text(key), Text("" if value is None else writing.toml(value)), Text(origin))
    stdout().print(table)


@app.command("schema")
def schema(
    toml: Annotated[
        bool, typer.Option("--toml", help="An example file instead, with every setting's default.")
    ] = False,
) -> None:
    """Print the JSON schema of the configuration file."""
    if toml:
        typer.echo(writing.example(), nl=False)
    else:
        print_json(Settings.model_json_schema())


@app.command("reload")
@needs_server
def reload(client: Client, *, json: Json = False) -> None:
    """Let a running server read its configuration, token file and certificates again.

    All of it is put in force, or nothing: if anything is wrong, or something differs that cannot change while it runs.
    """
    changed = client.reload_config()
    if json:
        print_json({"changed": changed})
    else:
        stdout().print(f"reloaded; changed: {', '.join(changed) or 'nothing'}", markup=False)
