"""Which kind of source a URI means."""

from __future__ import annotations

from pathlib import Path

from gralora_runtime.adapters.catalogue.sources.directory import DirectorySource
from gralora_runtime.adapters.catalogue.sources.source import Source


def open_source(uri: str, *, allow_roots: tuple[Path, ...] = (), follows: bool = True) -> Source:
    """Raises ConfigError for one that cannot be asked."""
    return DirectorySource(Path(uri), allow_roots=allow_roots, follows=follows)
