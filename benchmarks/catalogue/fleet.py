"""A directory of adapters, one for each name, and what lies in each now."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.catalogue.content import Contents
from gralora_runtime.errors import ConfigError

SAME_AS_BEFORE = 50  # one name of so many has the content of the name before it
SPARE = 1.5  # of the disk that the adapters take: new contents come, old ones go


@dataclass(frozen=True, slots=True)
class Fleet:
    """`directory` is what a server is given; contents are made beside it, on the same file system."""

    contents: Contents
    directory: Path
    staging: Path
    initial: dict[str, int]  # content by name

    def stage(self, number: int) -> Path:
        """The content, written where no server sees it."""
        out = self.staging / str(number)
        self.contents.write(number, out)
        return out


def make_fleet(contents: Contents, folder: Path, count: int) -> Fleet:
    """Raises ConfigError if there is no room for it."""
    needed = int(SPARE * count * contents.mean_bytes())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ConfigError(f"{count} adapters need {needed >> 20} MiB of disk below {folder}, {free >> 20} MiB are free")
    initial = {f"a{index:05}": index - (index % SAME_AS_BEFORE == 1) for index in range(count)}
    fleet = Fleet(contents, folder / "adapters", folder / "staging", initial)
    fleet.directory.mkdir()
    fleet.staging.mkdir()
    with ThreadPoolExecutor(2) as threads:
        for _ in threads.map(lambda item: contents.write(item[1], fleet.directory / item[0]), initial.items()):
            pass
    return fleet
