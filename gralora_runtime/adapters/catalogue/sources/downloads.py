"""The folder of all that was downloaded: what is there, what has to go for something new, and who may fetch what.

Knows no remote. A finished download is a directory with a config in it, and got its name in one step. Everything
unfinished lies in one other folder, which is emptied at start.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from gralora_runtime.adapters.catalogue.sources.fetch import Fetch, Limits
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.errors import AdapterSourceError, ConfigError

log = logging.getLogger(__name__)

UNFINISHED = "tmp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One download that somebody asks for."""

    directory: Path  # where it will be
    name: str
    source: str
    num_bytes: int  # as the remote announces it


@dataclass(slots=True, kw_only=True)
class _Kept:
    """One directory that takes room."""

    num_bytes: int
    used_ns: int  # since the epoch, as the directory's own time: the order outlives the process
    found_s: float  # monotonic; when somebody was last told of it
    finished: bool = True


class Downloads:
    """Keeps the folder within its budget. `in_use` is asked about finished directories, and must not call back."""

    def __init__(
        self,
        folder: Path,
        *,
        budget_bytes: int,
        in_use: Callable[[Path], bool],
        limits: Limits,
        grace_s: float = 60.0,
    ) -> None:
        self.folder = folder.absolute()
        self.limits = limits
        self._budget_bytes = budget_bytes
        self._in_use = in_use
        self._grace_s = grace_s  # whoever was told of a directory has yet to open its files
        self._changed = threading.Condition()
        self._reserved: dict[Path, int] = {}  # by those that are being fetched
        self._stop = threading.Event()
        self._unfinished = self.folder / UNFINISHED
        self._lock = self._open()
        self._kept = dict(self._finished())

    def close(self) -> None:
        """Fetching ends where it is."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._lock.release()

    def use(self, directory: Path) -> bool:
        """Whether it is there, whole; then it is the last to go."""
        with self._changed:
            return self._use(directory)

    def obtain(self, wanted: Wanted, fill: Callable[[Fetch], None]) -> None:
        """See to it that the directory is there. `fill` fetches its files, unless somebody else just did."""
        try:
            with self._alone(wanted) as already:
                if not already:
                    self._fetch(wanted, fill)
        except OSError as cause:
            raise self._error(wanted, f"cannot be stored in {self.folder} ({cause.strerror})") from cause

    def grow(self, wanted: Wanted, num_bytes: int) -> None:
        """Room for so much more than was announced, while it is being fetched."""
        with self._changed:
            self._make_room(wanted, num_bytes)
            self._reserved[wanted.directory] += num_bytes

    def _open(self) -> FileLock:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock", thread_local=False)  # whichever thread closes
            lock.acquire(timeout=0)
            if self._unfinished.exists():
                shutil.rmtree(self._unfinished)
            self._unfinished.mkdir()
        except Timeout as cause:
            raise ConfigError(f"{self.folder}: another server keeps its downloads here") from cause
        except OSError as cause:
            raise ConfigError(f"{self.folder}: downloads cannot be kept here ({cause.strerror})") from cause
        return lock

    def _finished(self) -> Iterator[tuple[Path, _Kept]]:
        for config in self.folder.rglob(CONFIG_FILE):
            directory = config.parent
            used_ns = directory.stat().st_mtime_ns
            yield directory, _Kept(num_bytes=_size(directory), used_ns=used_ns, found_s=float("-inf"))

    def _use(self, directory: Path) -> bool:
        kept = self._kept.get(directory)
        if kept is None:
            return False
        kept.used_ns, kept.found_s = time.time_ns(), time.monotonic()
        try:
            (directory / CONFIG_FILE).stat()
            os.utime(directory, ns=(kept.used_ns, kept.used_ns))
        except OSError:  # somebody else removed it
            del self._kept[directory]
            return False
        return True

    @contextmanager
    def _alone(self, wanted: Wanted) -> Iterator[bool]:
        """Nobody else fetches the directory meanwhile. True: it is there already."""
        directory = wanted.directory
        with self._changed:
            self._changed.wait_for(
                lambda: directory not in self._reserved or self._stop.is_set(), self.limits.download_s
            )
            if self._stop.is_set():
                raise self._error(wanted, "is no longer asked: the server is shutting down")
            if directory in self._reserved:
                raise self._error(wanted, f"did not send all of it within {self.limits.download_s:g} s")
            already = self._use(directory)
            if not already:
                self._reserve(wanted)
        try:
            yield already
        finally:
            if not already:
                self._settle(directory)

    def _reserve(self, wanted: Wanted) -> None:
        left = self._kept.pop(self._staging(wanted.directory), None)  # an earlier attempt's, to go on from
        try:
            self._make_room(wanted, wanted.num_bytes)
        except AdapterSourceError:
            if left is not None:
                self._kept[self._staging(wanted.directory)] = left
            raise
        self._reserved[wanted.directory] = wanted.num_bytes

    def _make_room(self, wanted: Wanted, num_bytes: int) -> None:
        """Those that were used least recently go first, and before them what attempts that failed have left."""
        short_bytes = num_bytes - self._free_bytes()
        victims: list[Path] = []
        for directory, kept in sorted(self._kept.items(), key=lambda item: (item[1].finished, item[1].used_ns)):
            if short_bytes > 0 and (not kept.finished or self._may_go(directory, kept)):
                victims.append(directory)
                short_bytes -= kept.num_bytes
        if short_bytes > 0:  # nothing is removed in vain
            problem = f"has {num_bytes} bytes to fetch, for which the budget of {self._budget_bytes} bytes has no room"
            raise self._error(wanted, problem)
        for directory in victims:
            self._remove(directory)
        if shutil.disk_usage(self.folder).free < num_bytes:
            raise self._error(wanted, f"has {num_bytes} bytes to fetch, for which the disk has no room")

    def _free_bytes(self) -> int:
        kept = sum(each.num_bytes for each in self._kept.values())
        return self._budget_bytes - kept - sum(self._reserved.values())

    def _may_go(self, directory: Path, kept: _Kept) -> bool:
        return time.monotonic() - kept.found_s >= self._grace_s and not self._in_use(directory)

    def _remove(self, directory: Path) -> None:
        log.info("%s is removed: room is needed for another download", directory)
        del self._kept[directory]
        removed = self._unfinished / f"removed-{uuid.uuid4().hex}"
        directory.rename(removed)  # first, so that nobody finds half of it
        shutil.rmtree(removed)

    def _fetch(self, wanted: Wanted, fill: Callable[[Fetch], None]) -> None:
        staging = self._staging(wanted.directory)
        staging.mkdir(exist_ok=True)
        fetch = Fetch(
            staging,
            name=wanted.name,
            source=wanted.source,
            num_bytes=wanted.num_bytes,
            limits=self.limits,
            stop=self._stop,
        )
        log.info("%s: fetching %.1f MB from %s", wanted.name, wanted.num_bytes / 1e6, wanted.source)
        fill(fetch)
        wanted.directory.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(wanted.directory)
        log.info("%s: fetched to %s", wanted.name, wanted.directory)

    def _settle(self, directory: Path) -> None:
        """What is there now is what counts, whole or not."""
        staging = self._staging(directory)
        with self._changed:
            del self._reserved[directory]
            now_ns, now_s = time.time_ns(), time.monotonic()
            for path in (directory, staging):
                if path.is_dir():
                    self._kept[path] = _Kept(
                        num_bytes=_size(path), used_ns=now_ns, found_s=now_s, finished=path == directory
                    )
            self._changed.notify_all()

    def _staging(self, directory: Path) -> Path:
        return self._unfinished / hashlib.sha256(str(directory).encode()).hexdigest()[:32]

    def _error(self, wanted: Wanted, problem: str) -> AdapterSourceError:
        return AdapterSourceError(wanted.name, wanted.source, problem, self.limits.retry_after_s)


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
