"""Adapters for load tests on this machine: the user's first, then synthetic ones, which stay in the cache."""

from __future__ import annotations

import re
from pathlib import Path
from shutil import copytree

from gralora_runtime.errors import ConfigError
from gralora_server.cli.environment import cache_dir


def customers(model: Path, own: Path | None, kinds: str, count: int) -> tuple[Path, list[str]]:
    """A directory with at least `count` adapters, and their names in alphabetical order. What was made stays there."""
    from gralora_server.loadtest.headers import shapes_digest
    from gralora_server.loadtest.synthetic import make_adapters, parse_kinds

    kept = re.sub(r"[^\w.]+", "-", kinds if own is None else f"{own.name}-{kinds}")
    folder = cache_dir() / "loadtest-adapters" / shapes_digest(model) / kept
    folder.mkdir(parents=True, exist_ok=True)
    names = own_names(own)
    for name in names:
        assert own is not None
        copytree(own / name, folder / name, dirs_exist_ok=True)
    made = make_adapters(model, folder, parse_kinds(kinds), max(0, count - len(names)))
    return folder, sorted([*names, *made])[:count]


def own_names(own: Path | None) -> list[str]:
    """Of the adapters in a directory, in alphabetical order. Raises ConfigError if it has none."""
    if own is None:
        return []
    names = sorted(path.parent.name for path in own.glob("*/adapter_config.json"))
    if not names:
        raise ConfigError(f"--adapters: there are no adapters in {str(own)!r}")
    return names
