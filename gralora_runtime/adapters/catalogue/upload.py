"""One adapter that is being sent: puts pieces where they belong, and checks the whole. Knows no other upload."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gralora_runtime.adapters.catalogue.manifest import Manifest, UploadFile
from gralora_runtime.errors import (
    AdapterUploadError,
    AdapterUploadQuotaError,
    GraloraError,
    InvalidRequestError,
)

HASHED_BYTES = 1 << 20


@contextmanager
def blaming_disk(name: str) -> Iterator[None]:
    """What the disk under an upload of this name refuses is an operator's to mend, and no bug."""
    try:
        yield
    except OSError as cause:
        if cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise AdapterUploadQuotaError(name, "the disk is full") from cause
        raise AdapterUploadError(name, f"cannot be written or read: {cause.strerror}") from cause


class Upload:
    """What one call sends. Its methods wait for the disk and for each other; `close` waits for nothing."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        staging: Path,
        directory: Path,
        publish: Callable[[Manifest], None],
        leave: Callable[[Upload], None],
    ) -> None:
        """`staging` becomes `directory` by `publish`."""
        self.manifest = manifest
        self._staging = staging
        self._directory = directory
        self._publish = publish
        self._leave = leave
        self._lock = threading.Lock()
        self._ended_by: GraloraError | None = None

    def write(self, file: str, offset: int, data: bytes) -> None:
        """Bytes behind or over those that are here. What is here is always a file's beginning, so gaps are refused."""
        announced = self.manifest.file(file)
        if announced is None:
            raise InvalidRequestError("chunk.file", file, "is not in the header")
        with self._lock:
            self._refuse_when_ended()
            if self._directory.is_dir():
                return  # it is whole already, and was checked
            with blaming_disk(self.manifest.name):
                self._write(announced, offset, data)

    def finish(self) -> Path:
        """The directory of the whole. What is missing can be sent by another call."""
        with self._lock, blaming_disk(self.manifest.name):
            self._refuse_when_ended()
            if not self._directory.is_dir():
                for file in self.manifest.files:
                    self._check_size(file)
                for file in self.manifest.files:
                    self._check_content(file)
                self._publish(self.manifest)
        return self._directory

    def end(self, error: GraloraError) -> None:
        """Whoever sends it hears of this. Returns when nothing of it is being written any more."""
        with self._lock:
            self._ended_by = error

    def close(self) -> None:
        """Nothing more is sent."""
        self._leave(self)

    def _refuse_when_ended(self) -> None:
        if self._ended_by is not None:
            raise self._ended_by

    def _write(self, file: UploadFile, offset: int, data: bytes) -> None:
        path = self._staging / file.name
        path.touch()
        here = path.stat().st_size
        if not 0 <= offset <= here:
            raise self._error(f"goes on at byte {offset} of {file.name}, of which {here} bytes are here")
        if offset + len(data) > file.size:
            raise self._error(f"sends more than the {file.size} bytes of {file.name} that it announced")
        with path.open("r+b") as out:
            out.seek(offset)
            out.write(data)

    def _check_size(self, file: UploadFile) -> None:
        path = self._staging / file.name
        path.touch()
        if (here := path.stat().st_size) != file.size:
            raise self._error(f"is not complete: {here} of {file.size} bytes of {file.name} are here")

    def _check_content(self, file: UploadFile) -> None:
        path = self._staging / file.name
        hasher = hashlib.sha256()
        with path.open("rb") as opened:
            while piece := opened.read(HASHED_BYTES):
                hasher.update(piece)
            os.fsync(opened.fileno())  # before the directory gets its name: a crash must not leave an empty file there
        if hasher.hexdigest() != file.sha256:
            path.unlink()  # or another call would find it complete
            raise self._error(f"has a wrong {file.name}: its SHA-256 is {hasher.hexdigest()}, not {file.sha256}")

    def _error(self, problem: str) -> AdapterUploadError:
        return AdapterUploadError(self.manifest.name, problem)
