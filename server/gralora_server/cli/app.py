"""The commands, and how each ends: an exit code and one line on standard error, no traceback for a user's mistake."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from gralora_runtime.errors import (
    AdapterCapacityError,
    AdapterConversionError,
    AdapterRejectedError,
    ConfigError,
    GraloraError,
    ModelUnsupportedError,
)
from gralora_server.cli import (
    adapters,
    adapters_convert,
    adapters_diff,
    adapters_golden,
    adapters_merge,
    config,
    explain,
    generate,
    health,
    loadtest,
    model,
    plan,
    serve,
    serve_fleet,
    status,
    tokens,
    top,
    usage,
)
from gralora_server.cli.output import CommandError, ExitCode, print_error

EXIT_CODES = (
    "Exit codes: 0 success; 1 the operation failed, the server refused it, or what was compared differs; "
    "2 wrong options or settings, or a model that cannot be served; 3 no server answers; "
    "4 the adapter is broken, unsupported, or does not fit; 130 interrupted."
)

# What every complaint about the command line derives from; typer has no public name for it.
UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="gralora",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve thousands of GraLoRA and LoRA adapters over one base model, in one batch, over gRPC.",
    epilog=EXIT_CODES,
)
app.command("serve")(serve.serve)
app.command("serve-fleet", hidden=True)(serve_fleet.serve_fleet)
app.command("generate")(generate.generate)
app.command("explain")(explain.explain)
app.command("plan")(plan.plan)
app.command("status")(status.status)
app.command("top")(top.top)
app.command("health")(health.health)
app.command("usage")(usage.usage)
adapters.app.command("convert")(adapters_convert.convert)
adapters.app.command("diff")(adapters_diff.diff)
adapters.app.command("golden")(adapters_golden.golden)
adapters.app.command("merge")(adapters_merge.merge)
app.add_typer(adapters.app, name="adapters")
app.add_typer(model.app, name="model")
app.add_typer(config.app, name="config")
app.add_typer(loadtest.app, name="loadtest")
app.add_typer(tokens.app, name="tokens")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gralora {version('gralora-server')}")
        raise typer.Exit


@app.callback()
def gralora(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code of a command line; None: the process's own."""
    try:
        return app(arguments, prog_name="gralora", standalone_mode=False) or ExitCode.OK
    except UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "gralora"
        print_error(f"{error.format_message()} (see {where} --help)")
        return ExitCode.USAGE
    except CommandError as error:
        print_error(str(error))
        return error.code
    except GraloraError as error:
        print_error(str(error))
        return _code(error)
    except typer.Abort:
        print_error("interrupted")
        return 130


def _code(error: GraloraError) -> ExitCode:
    if isinstance(error, ConfigError | ModelUnsupportedError):
        return ExitCode.USAGE
    if isinstance(error, AdapterRejectedError | AdapterCapacityError | AdapterConversionError):
        return ExitCode.UNFIT_ADAPTER
    return ExitCode.FAILED
