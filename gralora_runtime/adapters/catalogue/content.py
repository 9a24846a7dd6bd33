"""Copies of what directories held, by digest: a version can be read again after its files were overwritten.

Copies are made in a thread of its own, beside loads. A copy becomes visible by one rename, so a kill leaves it whole or
leaves nothing. Where the file system can, a copy shares its blocks with the original.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from gralora_runtime.adapters.checkpoint.containment import resolve_inside
from gralora_runtime.adapters.checkpoint.file import MalformedError
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE, GOLDEN_FILE, files_stamp
from gralora_runtime.adapters.checkpoint.own_tokens import TOKENIZER_FILE, added_tokens_text
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE

log = logging.getLogger(__name__)

UNFINISHED = "tmp"
FILES = (CONFIG_FILE, WEIGHTS_FILE)
WANTED = (*FILES, GOLDEN_FILE)  # the last, where there is one; and what is read of a tokenizer


class ContentStore:
    """At most `budget_bytes` of copies; the least recently used go first, but for those that `needed` names."""

    def __init__(self, folder: Path, *, budget_bytes: int, needed: Callable[[str], bool] = lambda _: False) -> None:
        """`needed`: whether a digest's copy may not go, because nothing else holds that content any more."""
        self._folder = folder
        self._budget_bytes = budget_bytes
        self._needed = needed
        self._lock = threading.Lock()
        self._copying = ThreadPoolExecutor(1, thread_name_prefix="adapter-copies")
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        (folder / UNFINISHED).mkdir(parents=True)
        # By digest: bytes. In the order of use, which begins with the order of making.
        found = [entry for entry in folder.iterdir() if entry.name != UNFINISHED]
        self._sizes = {entry.name: _bytes_of(entry) for entry in sorted(found, key=lambda entry: entry.stat().st_mtime)}

    def find(self, digest: str) -> Path | None:
        """Where the copy lies, if there is one. Counts as a use."""
        with self._lock:
            size = self._sizes.pop(digest, None)
            if size is None:
                return None
            self._sizes[digest] = size
            return self._folder / digest

    def keep(
        self, digest: str, directory: Path, roots: tuple[Path, ...], stamp: object, done: Callable[[str, Path], None]
    ) -> None:
        """Copy soon, if the files are still those of `stamp`; `done` is then called in the store's thread."""
        self._copying.submit(self._keep, digest, directory, roots, stamp, done)

    def remove(self, digest: str) -> None:
        with self._lock:
            if self._sizes.pop(digest, None) is not None:
                self._delete(digest)

    def drop(self, digest: str, may_go: Callable[[str], bool]) -> None:
        """Remove soon, in the store's thread, if `may_go` says so there."""
        with suppress(RuntimeError):  # closed: the next start finds out that nobody has it
            self._copying.submit(self._drop, digest, may_go)

    def digests(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._sizes)

    def close(self) -> None:
        self._copying.shutdown(cancel_futures=True)

    def _keep(
        self, digest: str, directory: Path, roots: tuple[Path, ...], stamp: object, done: Callable[[str, Path], None]
    ) -> None:
        try:
            copy = self._copy(digest, directory, roots, stamp)
            if copy is not None:
                done(digest, copy)
        except OSError as error:
            log.warning("no copy of the adapter with digest %s is kept: %s", digest, error)
            shutil.rmtree(self._folder / UNFINISHED / digest, ignore_errors=True)
        except Exception:  # ours, and nobody waits for this thread's result
            log.exception("keeping a copy of the adapter with digest %s failed", digest)

    def _drop(self, digest: str, may_go: Callable[[str], bool]) -> None:
        try:
            if may_go(digest):
                self.remove(digest)
        except Exception:
            log.exception("removing the copy of the adapter with digest %s failed", digest)

    def _copy(self, digest: str, directory: Path, roots: tuple[Path, ...], stamp: object) -> Path | None:
        if (known := self.find(digest)) is not None:
            return known
        inside = {name: resolve_inside(roots, directory / name) for name in WANTED}
        files = {name: file for name, file in inside.items() if file is not None and file.exists()}
        if files_stamp(directory) != stamp or not files.keys() >= set(FILES):
            return None
        num_bytes = sum(file.stat().st_size for file in files.values())
        if not self._make_room(num_bytes):
            return None
        fresh = self._folder / UNFINISHED / digest
        fresh.mkdir(exist_ok=True)
        for name, file in files.items():
            copy_file(file, fresh / name)
        with suppress(MalformedError):  # there is none, or none that is read
            (fresh / TOKENIZER_FILE).write_bytes(added_tokens_text(directory, roots))
        if files_stamp(directory) != stamp:  # it is not what was read
            shutil.rmtree(fresh)
            return None
        with self._lock:
            fresh.rename(self._folder / digest)
            self._sizes[digest] = num_bytes
        return self._folder / digest

    def _make_room(self, num_bytes: int) -> bool:
        with self._lock:
            for digest in list(self._sizes):
                if sum(self._sizes.values()) + num_bytes <= self._budget_bytes:
                    return True
                if not self._needed(digest):
                    del self._sizes[digest]
                    self._delete(digest)
            return sum(self._sizes.values()) + num_bytes <= self._budget_bytes

    def _delete(self, digest: str) -> None:
        gone = self._folder / UNFINISHED / f"{digest}.gone"
        (self._folder / digest).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def copy_file(source: Path, target: Path) -> None:
    """Raises OSError. The kernel copies, and shares blocks where the file system can."""
    with source.open("rb") as read, target.open("wb") as written:
        left = os.fstat(read.fileno()).st_size
        while left > 0:
            copied = os.copy_file_range(read.fileno(), written.fileno(), left)
            if copied == 0:
                raise OSError(f"{source.name} became shorter while it was copied")
            left -= copied
        os.fsync(written.fileno())


def _bytes_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())
