"""Brings one adapter's files here: goes on where a connection broke, in limited time, and checks what arrived.

Knows neither the remote (who opens a file at an offset is given) nor what becomes of the folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from gralora_runtime.errors import AdapterSourceError

log = logging.getLogger(__name__)

PROGRESS_S = 5.0  # between two lines of the log
MAX_CUTS = 20  # of one file, in one attempt; the next attempt goes on from there
HASHED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long a remote may take."""

    answer_s: float = 10.0  # until it says what it has
    stall_s: float = 30.0  # between two pieces of a body
    download_s: float = 1800.0  # for all files of one adapter
    pause_s: float = 1.0  # before a broken connection is tried again
    retry_after_s: float = 15.0  # what clients are told where the remote says nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksum:
    """What a remote says that a file hashes to, in lower case."""

    kind: Literal["sha256", "md5", "git"]  # git: the name that git gives to these bytes
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file as the remote describes it."""

    name: str
    num_bytes: int
    checksum: Checksum | None  # None: the remote knows none


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A file's bytes from `start` on, which is 0 where the remote cannot begin in the middle."""

    start: int
    chunks: Iterator[bytes]


class CutError(Exception):
    """The connection broke. Another one may go on from there."""


OpenAt = Callable[[int], AbstractContextManager[Body]]


class Fetch:
    """One adapter on its way into `folder`, which may hold what an earlier attempt left."""

    def __init__(
        self, folder: Path, *, name: str, source: str, num_bytes: int, limits: Limits, stop: threading.Event
    ) -> None:
        self.folder = folder
        self._name = name
        self._source = source
        self._num_bytes = num_bytes
        self._limits = limits
        self._stop = stop
        self._started_s = self._logged_s = time.monotonic()
        self._here = 0  # bytes of this adapter, those of earlier attempts too
        self._received = 0

    def file(self, file: RemoteFile, open_at: OpenAt) -> Path:
        """The whole file, checked."""
        path = self.folder / file.name
        path.touch()
        with path.open("r+b") as out:
            self._here += out.seek(0, os.SEEK_END)
            self._complete(file, open_at, out)
            os.fsync(out.fileno())  # before the folder gets its name: a crash must not leave an empty file under it
        if file.checksum is not None:
            self._check(path, file, file.checksum)
        return path

    def error(self, problem: str) -> AdapterSourceError:
        return AdapterSourceError(self._name, self._source, problem, self._limits.retry_after_s)

    def keep_time(self) -> None:
        """Called wherever bytes are waited for or worked on."""
        if self._stop.is_set():
            raise self.error("is no longer asked: the server is shutting down")
        if time.monotonic() - self._started_s > self._limits.download_s:
            raise self.error(f"did not send all of it within {self._limits.download_s:g} s")

    def _complete(self, file: RemoteFile, open_at: OpenAt, out: BinaryIO) -> None:
        cuts = 0
        while out.tell() < file.num_bytes:
            self.keep_time()
            problem = "the body ended early"
            try:
                with open_at(out.tell()) as body:
                    self._append(file, body, out)
            except CutError as cause:
                problem = str(cause)
            if out.tell() == file.num_bytes:
                return
            cuts += 1
            if cuts > MAX_CUTS:
                raise self.error(f"broke off {file.name} {cuts} times ({problem})")
            log.warning("%s: %s broke off at byte %d (%s)", self._name, file.name, out.tell(), problem)
            self._stop.wait(self._limits.pause_s)

    def _append(self, file: RemoteFile, body: Body, out: BinaryIO) -> None:
        if body.start != out.tell():
            self._here -= out.tell() - body.start
            out.seek(body.start)
            out.truncate()
        for chunk in body.chunks:
            if out.tell() + len(chunk) > file.num_bytes:
                raise self.error(f"sends more than the {file.num_bytes} bytes of {file.name} that it announced")
            out.write(chunk)
            self._tell(len(chunk))
            self.keep_time()

    def _tell(self, num_bytes: int) -> None:
        self._here += num_bytes
        self._received += num_bytes
        now_s = time.monotonic()
        if now_s - self._logged_s >= PROGRESS_S:
            self._logged_s = now_s
            rate = self._received / (now_s - self._started_s) / 1e6
            log.info("%s: %.1f of %.1f MB, %.1f MB/s", self._name, self._here / 1e6, self._num_bytes / 1e6, rate)

    def _check(self, path: Path, file: RemoteFile, expected: Checksum) -> None:
        found = self._hash(path, expected.kind, file.num_bytes)
        if found != expected.value:
            path.unlink()  # or the next attempt would find it complete
            raise self.error(f"sent a wrong {file.name}: its {expected.kind} hash is {found}, not {expected.value}")

    def _hash(self, path: Path, kind: str, num_bytes: int) -> str:
        sha1 = hashlib.sha1(f"blob {num_bytes}\0".encode(), usedforsecurity=False)
        hasher = sha1 if kind == "git" else hashlib.new(kind, usedforsecurity=False)
        with path.open("rb") as opened:
            while chunk := opened.read(HASHED_BYTES):
                hasher.update(chunk)
                self.keep_time()
        return hasher.hexdigest()
