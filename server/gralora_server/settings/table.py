"""Every setting that is an option of `gralora serve`, and what it is called in each place: derived from `sections.py`.

One rule: `max_queue` of the section `[engine]` is the option `--max-queue` and the variable GRALORA_ENGINE_MAX_QUEUE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from gralora_server.settings.sections import Called, Section, Settings

_KINDS = {
    "string": "TEXT",
    "integer": "INTEGER",
    "number": "FLOAT",
    "boolean": "true|false",
    "path": "PATH",
    "password": "TEXT",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting. `kind` is what its values are, as help texts say it."""

    section: str
    name: str
    option: str  # with its dashes
    variables: tuple[str, ...]  # the first one that is set counts
    field: str  # of the configuration that takes it
    text: str
    kind: str
    choices: tuple[str, ...]  # (): other values than these are allowed
    default: Any
    is_list: bool
    is_secret: bool

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def keys(self) -> tuple[str, str]:
        return self.section, self.name

    def value(self, settings: Settings) -> Any:
        return getattr(getattr(settings, self.section), self.name)


def sections() -> dict[str, type[Section]]:
    """The tables of the file that have settings, by their names."""
    found = {name: field.annotation for name, field in Settings.model_fields.items()}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Section)}


def _settings() -> Iterator[Setting]:
    for section, kind in sections().items():
        schemas = kind.model_json_schema(mode="validation")["properties"]
        for name, field in kind.model_fields.items():
            yield _setting(section, name, field, schemas[name])


def _setting(section: str, name: str, field: FieldInfo, schema: dict[str, Any]) -> Setting:
    called = next((one for one in field.metadata if isinstance(one, Called)), Called())
    variable = f"GRALORA_{section}_{name}".upper()
    schema = _not_null(schema)
    is_list = schema.get("type") == "array"
    return Setting(
        section=section,
        name=name,
        option="--" + (called.option or name.replace("_", "-")),
        variables=(variable, called.variable) if called.variable else (variable,),
        field=called.field or name,
        text=field.description or "",
        kind=_kind(schema["items"] if is_list else schema),
        choices=tuple(schema.get("enum", ())),
        default=field.default,
        is_list=is_list,
        is_secret=SecretStr in _types(field.annotation),
    )


def _types(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", (annotation,))


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Of a value that may be left out: its schema when it is there."""
    kinds = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    return kinds[0] if len(kinds) == 1 else schema


def _kind(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "|".join(schema["enum"])
    word = str(schema.get("format", schema.get("type", "")))
    return _KINDS.get(word, word)


SETTINGS = tuple(_settings())
