"""`gralora adapters merge`: one adapter in a model's weights, for whoever serves a single customer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gralora_server.cli.options import Json
from gralora_server.cli.output import print_json, stdout
from gralora_server.cli.progress import stages


def merge(
    adapter: Annotated[Path, typer.Argument(help="An adapter directory.")],
    model: Annotated[Path, typer.Option(help="The base model's directory.")],
    out: Annotated[Path, typer.Option(help="A new directory, or an empty one.")],
    json: Json = False,
) -> None:
    """Write the model with the adapter merged into its weights, as a normal model directory.

    In the model's own dtype, rounded once; the model is read into memory as a whole.
    """
    from gralora_runtime.model.merging import write_merged

    with stages() as report:
        merged = write_merged(adapter, model, out, report)
    if json:
        print_json(merged)
    else:
        line = f"{merged.path}: {merged.num_modules} modules merged in {merged.dtype}, adapter {merged.adapter_digest}"
        stdout().print(line, markup=False, soft_wrap=True)
