"""Where adapters come from, as the catalogue sees it. Knows no scheme: each has a file of its own beside this one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An adapter's directory as a source has it now."""

    directory: Path  # on this machine
    roots: tuple[Path, ...]  # links inside may end below these and nowhere else
    revision: str  # what the source calls this content ("" where it has no such word)


class Source(Protocol):
    """Where adapters come from. Asked in threads of its own; may be slow, never for ever."""

    uri: str  # as the operator wrote it, for logs and lists
    follows: bool  # its newest content is served by itself; otherwise it waits for a promotion

    def find(self, name: str) -> Found | None:
        """None: it has no such adapter. Raises AdapterSourceError."""
        ...

    def names(self) -> Iterable[str]:
        """Those that can be told without asking a remote."""
        ...

    def close(self) -> None: ...
