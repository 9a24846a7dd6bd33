"""Which of an operator's words counts: an option before a variable before the file before the default."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from gralora_runtime.adapters.catalogue.similar import similar_name
from gralora_runtime.config import AdapterSource
from gralora_runtime.errors import ConfigError
from gralora_server.errors import ConfigInvalidError
from gralora_server.settings.configurations import engine_config, server_config
from gralora_server.settings.document import Document, read
from gralora_server.settings.problems import complaint, problems_of
from gralora_server.settings.sections import Settings
from gralora_server.settings.table import SETTINGS, Setting, sections

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Effective:
    """The settings, and who set each that is an option: an option, a variable, FILE:LINE or the default."""

    settings: Settings
    origins: Mapping[str, str]  # by the setting's key
    document: Document | None


@dataclass(frozen=True, slots=True)
class Layers:
    """Where settings are read from, as often as somebody asks. `options` are those that were given, by their keys."""

    file: Path | None
    environment: Mapping[str, str]
    options: Mapping[str, Any]

    def read(self) -> Effective:
        """Raises `ConfigInvalidError`, which says all that is wrong."""
        document = None if self.file is None else read(self.file)
        problems = list(_misspelt(self.environment))
        settings = Settings() if document is None else _from_file(document, problems)
        origins = {one.key: _file_origin(document, one) for one in SETTINGS}
        for setting, origin, given in self._given():
            origins[setting.key] = origin
            try:
                settings = _with(settings, setting, given)
            except ValidationError as error:
                problems += [f"{origin} {complaint(found, setting.keys)}" for found in error.errors()]
            except ValueError as error:  # a list's quotes
                problems.append(f"{origin} cannot be taken apart: {error}")
        if not problems:
            problems = _disagreements(settings, origins)
        if problems:
            raise ConfigInvalidError(problems)
        return Effective(settings, origins, document)

    def _given(self) -> Iterator[tuple[Setting, str, Any]]:
        """Of each setting, who speaks of it besides the file, and what he says."""
        for setting in SETTINGS:
            variable = next((name for name in setting.variables if self.environment.get(name)), None)
            if setting.key in self.options:
                yield setting, setting.option, self.options[setting.key]
            elif variable is not None:
                yield setting, f"${variable}", self.environment[variable]


NOTHING_SAID = Layers(None, {}, {})  # every setting has its default


def _from_file(document: Document, problems: list[str]) -> Settings:
    """The defaults, if there are problems."""
    # As JSON: a file's types are strict (a text is no number), but paths, roles and times are texts.
    try:
        as_json = json.dumps(document.values, default=str)
        found = Settings.model_validate_json(as_json, strict=True)
    except ValidationError as error:
        problems += problems_of(error, document)
        return Settings()
    except RecursionError:
        problems.append(f"{document.path} has tables that are nested too deeply")
        return Settings()
    settings: Settings = _below(found, document.path.absolute().parent)
    return settings


def _misspelt(environment: Mapping[str, str]) -> Iterator[str]:
    """Variables that nobody reads, where one with nearly that name is read. Others may be somebody else's: where a
    service is called gralora-server, Kubernetes makes a GRALORA_SERVER_PORT.
    """
    for section, kind in sections().items():
        prefix = f"GRALORA_{section.upper()}_"
        names = [name.upper() for name in kind.model_fields]
        for variable in sorted(environment):
            name = variable.removeprefix(prefix)
            near = similar_name(name, names) if variable.startswith(prefix) and name not in names else ""
            if near:
                yield f"${variable} is not a setting; did you mean {prefix}{near}?"


def _file_origin(document: Document | None, setting: Setting) -> str:
    return document.place(setting.keys) if document is not None and document.has(setting.keys) else DEFAULT


def _with(settings: Settings, setting: Setting, given: Any) -> Settings:
    """`given` is a text, or several of them, or what a switch says."""
    section = sections()[setting.section]
    value = shlex.split(given) if setting.is_list and isinstance(given, str) else given
    checked = getattr(section.model_validate({setting.name: value}), setting.name)
    changed = getattr(settings, setting.section).model_copy(update={setting.name: checked})
    return settings.model_copy(update={setting.section: changed})


def _disagreements(settings: Settings, origins: Mapping[str, str]) -> list[str]:
    """What is wrong with values that are right by themselves."""
    problems = []
    for configure in (lambda: server_config(settings), lambda: engine_config(settings, Path())):
        try:
            configure()
        except ConfigError as error:
            problems.append(_located(str(error), origins))
    return problems


def _located(message: str, origins: Mapping[str, str]) -> str:
    """A configuration's complaint begins with the name of a field."""
    field = message.split(maxsplit=1)[0]
    setting = next((one for one in SETTINGS if field in (one.field, one.name)), None)
    origin = DEFAULT if setting is None else origins[setting.key]
    return message if origin == DEFAULT else f"{origin}: {message}"


def _below(value: Any, folder: Path) -> Any:
    """The same, with every relative path taken from the folder that the file is in."""
    if isinstance(value, Path):
        return folder / value
    if isinstance(value, AdapterSource):
        return value if "://" in value.uri else AdapterSource(str(folder / value.uri), follows=value.follows)
    if isinstance(value, BaseModel):
        fields = {name: _below(getattr(value, name), folder) for name in type(value).model_fields}
        return value.model_copy(update=fields)
    if isinstance(value, tuple):
        return tuple(_below(one, folder) for one in value)
    if isinstance(value, dict):
        return {name: _below(one, folder) for name, one in value.items()}
    return value
