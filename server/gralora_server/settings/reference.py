"""The tables of `docs/config.md`: every setting, with its names, its default and its text."""

from __future__ import annotations

from gralora_server.settings.table import SETTINGS, Setting, sections
from gralora_server.settings.writing import shown

_HEAD = "| key | option | values | default | |\n|---|---|---|---|---|\n"


def table() -> str:
    """One table for each section of the file."""
    parts = []
    for name, kind in sections().items():
        rows = "".join(_row(setting) for setting in SETTINGS if setting.section == name)
        parts.append(f"### [{name}]\n\n{kind.__doc__}\n\n{_HEAD}{rows}")
    return "\n".join(parts)


def _row(setting: Setting) -> str:
    kind = f"list of {setting.kind}" if setting.is_list else setting.kind
    default = "" if setting.default is None and setting.name != "cuda_graphs" else f"`{shown(setting)}`"
    cells = (f"`{setting.name}`", f"`{setting.option}`", kind.replace("|", ", "), default, setting.text)
    return "| " + " | ".join(cells) + " |\n"
