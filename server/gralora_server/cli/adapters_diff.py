"""`gralora adapters diff`: what became of an adapter between two directories, without any server."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from gralora_server.cli.adapters import patterns
from gralora_server.cli.options import Json
from gralora_server.cli.output import ExitCode, print_json, stdout

if TYPE_CHECKING:
    from gralora_runtime.adapters.checkpoint.difference import Difference, ModuleDifference

MAX_LINES = 40  # of the table of modules; --json has all
MAX_CHARS = 60  # of one fact in the table of facts


def diff(
    a: Annotated[Path, typer.Argument(help="An adapter directory.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    model: Annotated[
        Path | None, typer.Option(help="A base model's directory: digests are then those that a server of it shows.")
    ] = None,
    json: Json = False,
) -> None:
    """Compare two adapters: digests, configs, and the size of the difference in each module.

    The digest is of all that an adapter computes with; exit code 0 says that it is equal, 1 that it is not. Norms are
    Frobenius norms of what is added to a weight, so that adapters of different ranks and kinds can be compared.
    """
    from gralora_runtime.adapters.checkpoint.difference import difference
    from gralora_runtime.adapters.checkpoint.whole import read_whole

    modules = None
    if model is not None:
        from gralora_runtime.model.module_shapes import module_shapes

        modules = module_shapes(model)
    found = difference(read_whole(a, modules), read_whole(b, modules))
    if json:
        print_json(_document(found))
    else:
        _print(found)
    if not found.equal:
        raise typer.Exit(ExitCode.DIFFERENT)


def _document(found: Difference) -> dict[str, Any]:
    return {
        "equal": found.equal,
        "digests": {"a": found.digest_a, "b": found.digest_b},
        "config": {key: {"a": of_a, "b": of_b} for key, (of_a, of_b) in found.facts.items()},
        "modules": [asdict(module) | {"relative": module.relative} for module in found.modules],
    }


def _print(found: Difference) -> None:
    facts = Table(box=None)
    for heading in ("", "A", "B"):
        facts.add_column(heading)
    facts.add_row("digest", found.digest_a[:16], found.digest_b[:16] + (" (equal)" if found.equal else ""))
    for key, (of_a, of_b) in found.facts.items():
        facts.add_row(
            key, Text(_shown(key, of_a)), Text(_shown(key, of_b))
        )  # Text: what a stranger wrote is not markup
    stdout().print(facts)
    if not found.equal:
        stdout().print(_table(found))


def _table(found: Difference) -> Table:
    table = Table(box=None)
    table.add_column("module", no_wrap=True)
    for heading in ("norm of A", "of B", "of A - B", "relative"):
        table.add_column(heading, justify="right", no_wrap=True)
    for module in found.modules[:MAX_LINES]:
        table.add_row(Text(module.module), *_numbers(module))
    if (left := len(found.modules) - MAX_LINES) > 0:
        table.caption, table.caption_justify = f"and {left} more modules, less different", "left"
    return table


def _numbers(module: ModuleDifference) -> list[str]:
    norms = [f"{module.norm_a:.4g}", f"{module.norm_b:.4g}"]
    if module.difference is None:
        return [*norms, "other widths", ""]
    return [*norms, f"{module.difference:.4g}", f"{module.relative:.3g}"]


def _shown(key: str, fact: Any) -> str:
    if key == "targets":
        fact = [f"{pattern} ({count})" for pattern, count in patterns(fact).items()]
    if isinstance(fact, list):
        fact = ", ".join(map(str, fact))
    text = f"{fact:g}" if isinstance(fact, float) else str(fact)
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 3] + "..."
