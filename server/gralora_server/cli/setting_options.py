"""The options of commands that read settings: one for each, derived from the settings' own description."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gralora_server.cli.environment import setting_variables
from gralora_server.settings.layers import Layers
from gralora_server.settings.table import SETTINGS, Setting
from gralora_server.settings.writing import shown

CONFIG_VARIABLE = "GRALORA_CONFIG"
ConfigOption = Annotated[
    Path | None, typer.Option(envvar=CONFIG_VARIABLE, help="A TOML file. Options and variables count before it.")
]
ConfigArgument = Annotated[Path | None, typer.Argument(envvar=CONFIG_VARIABLE, help="A TOML file.")]


def takes_settings(config: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command, as its first argument, what reads the settings; and its command line `config` and an option for
    every setting.
    """

    def give(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        file = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config)
        settings = [_parameter(setting) for setting in SETTINGS]

        def run(*, config: Path | None, **arguments: Any) -> None:
            given = {one.key: arguments.pop(_name(one)) for one in SETTINGS}
            options = {key: value for key, value in given.items() if value is not None and value != []}
            command(Layers(config, setting_variables(), options), **arguments)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        parameters = [file, *settings, *own]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions do not declare it
        return run

    return give


def _name(setting: Setting) -> str:
    return setting.option.removeprefix("--").replace("-", "_")


def _parameter(setting: Setting) -> inspect.Parameter:
    """Without a default of its own: what is not given here may be given elsewhere."""
    default = "" if setting.default in (None, ()) else f" [default: {shown(setting)}]"
    details: dict[str, Any] = {
        "help": f"{setting.text}{default}",
        "rich_help_panel": setting.section.capitalize(),
        "show_default": False,
    }
    if setting.kind == "true|false":
        kind: Any = bool | None
        names = [f"{setting.option}/--no-{setting.option.removeprefix('--')}"]
    else:
        kind, names = list[str] | None if setting.is_list else str | None, [setting.option]
        details["metavar"] = setting.kind
    return inspect.Parameter(
        _name(setting),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind, typer.Option(*names, **details)],
    )
