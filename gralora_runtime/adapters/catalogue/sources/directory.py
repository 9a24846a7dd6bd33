"""Adapters in a directory: one each, below an organisation's, or as the hub's cache keeps them.

pirate/adapter_config.json                                 pirate
acme/pirate/adapter_config.json                            acme/pirate
models--acme--pirate/snapshots/<sha>/adapter_config.json   acme/pirate (refs/main), acme/pirate@<branch or sha>
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from gralora_runtime.adapters.catalogue.names import is_name, is_part, split_revision
from gralora_runtime.adapters.catalogue.sources.source import Found
from gralora_runtime.adapters.checkpoint.containment import resolve_inside
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.errors import ConfigError

log = logging.getLogger(__name__)

HUB_PREFIX = "models--"
DEFAULT_REVISION = "main"
MAX_REF_BYTES = 256


class DirectorySource:
    """Looks, and keeps nothing. Links may end inside of the directory or of a root that the operator allows."""

    def __init__(self, path: Path, *, allow_roots: tuple[Path, ...] = (), follows: bool = True) -> None:
        if not path.is_dir():
            raise ConfigError(f"adapters: there is no directory {str(path)!r}")
        self.uri = str(path)
        self.follows = follows
        self.root = path.resolve()
        self.roots = (self.root, *(root.resolve() for root in allow_roots))

    def find(self, name: str) -> Found | None:
        bare, revision = split_revision(name)
        directory = self.root / bare
        if revision or not directory.is_dir():
            snapshot = self._snapshot(self.root / (HUB_PREFIX + bare.replace("/", "--")), revision or DEFAULT_REVISION)
            return None if snapshot is None else self._found(snapshot, snapshot.name)
        if "/" not in name and self._is_organisation(directory):
            return None
        return self._found(directory, "")

    def locate(self, path: Path) -> Found | None:
        resolved = resolve_inside(self.roots, self.root / path)
        return None if resolved is None else Found(directory=resolved, roots=self.roots, revision="")

    def names(self) -> Iterator[str]:
        for entry in self._entries(self.root):
            if is_snapshots(entry):
                yield _repository(entry.name)
            elif self._is_organisation(entry):
                yield from (f"{entry.name}/{inner.name}" for inner in self._entries(entry))
            else:
                yield entry.name

    def names_at(self, path: Path) -> tuple[str, ...]:
        """Which adapters a change of this path may concern."""
        try:
            parts = path.relative_to(self.root).parts[:2]
        except ValueError:
            return ()
        if not parts:
            return ()
        if parts[0].startswith(HUB_PREFIX):
            return (_repository(parts[0]),)
        names = [parts[0]]
        if len(parts) == 1:
            # A directory that is new: nobody watched it when what is in it came.
            inner = self._entries(self.root / parts[0]) if (self.root / parts[0]).is_dir() else []
            names += [f"{parts[0]}/{entry.name}" for entry in inner if (entry / CONFIG_FILE).exists()]
        elif (self.root / parts[0] / parts[1]).is_dir():
            names.append("/".join(parts))
        return tuple(name for name in names if is_name(name))

    def gone_at(self, path: Path) -> str:
        """What names were, or began with, that led where a change left nothing; "": there is still something."""
        try:
            parts = path.relative_to(self.root).parts[:2]
        except ValueError:
            return ""
        if parts and parts[0].startswith(HUB_PREFIX):
            return "" if os.path.lexists(path) else _repository(parts[0])
        for count in range(1, len(parts) + 1):
            if not os.path.lexists(self.root.joinpath(*parts[:count])):
                return "/".join(parts[:count])
        return ""

    def close(self) -> None:
        """Nothing is held."""

    def _found(self, directory: Path, revision: str) -> Found:
        """A link that leaves the roots is found, and refused when it is read: its owner then hears why."""
        return Found(directory=directory, roots=self.roots, revision=revision)

    def _snapshot(self, repository: Path, revision: str) -> Path | None:
        """The hub's cache names snapshots by commit; branches and tags are files that hold one."""
        try:
            with (repository / "refs" / revision).open("rb") as opened:
                revision = opened.read(MAX_REF_BYTES).decode("ascii", "replace").strip()
        except OSError:
            pass  # then it is a commit
        snapshots = repository / "snapshots"
        if not is_part(revision):
            return None
        if revision == DEFAULT_REVISION:  # a cache that was filled by commit has no refs
            only = self._entries(snapshots) if snapshots.is_dir() else []
            return only[0] if len(only) == 1 else None
        return snapshots / revision if (snapshots / revision).is_dir() else None

    def _is_organisation(self, directory: Path) -> bool:
        """It holds no adapter, but directories that do."""
        if os.path.exists(os.path.join(directory, CONFIG_FILE)):  # noqa: PTH110,PTH118  # of thousands, at start
            return False
        return any((entry / CONFIG_FILE).exists() for entry in self._entries(directory))

    @staticmethod
    def _entries(directory: Path) -> list[Path]:
        """Directories that have an adapter's name, in order."""
        found: list[str] = []
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    try:
                        if is_part(entry.name) and entry.is_dir():
                            found.append(entry.name)
                    except OSError as cause:
                        log.warning("%s is passed over: %s", entry.path, cause)
        except OSError as cause:
            log.warning("%s cannot be looked into: %s", directory, cause)
        return [directory / name for name in sorted(found)]


def is_snapshots(directory: Path) -> bool:
    return directory.name.startswith(HUB_PREFIX) and (directory / "snapshots").is_dir()


def _repository(folder: str) -> str:
    return folder.removeprefix(HUB_PREFIX).replace("--", "/", 1)
