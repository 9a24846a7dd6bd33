"""Takes an adapter's files out of an archive that a stranger made: known names, real files, and no more than announced.

Knows neither where the archive comes from nor where the files go.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gralora_runtime.adapters.catalogue.sources.files import KNOWN_FILES

CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20  # what an archive may say of one file, or in a zip of all
# A reader of archives fails in many ways when bytes make no sense; none of them says more than that.
_BROKEN = (
    tarfile.TarError,
    gzip.BadGzipFile,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


class ArchiveError(ValueError):
    """The archive is not what we take. The message is a sentence for its owner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveLimits:
    """What an archive may hold."""

    packed_bytes: int = 8 << 30
    unpacked_bytes: int = 16 << 30
    num_entries: int = 16


class Unpacking:
    """One archive's files on their way into `folder`. `room` is told what each takes before it is written."""

    def __init__(
        self, folder: Path, *, limits: ArchiveLimits, room: Callable[[int], None], keep_time: Callable[[], None]
    ) -> None:
        self._folder = folder
        self._limits = limits
        self._room = room
        self._keep_time = keep_time
        self._num_entries = 0
        self._num_bytes = 0
        self._seen: set[str] = set()

    def tar(self, archive: Path) -> None:
        try:
            with gzip.open(archive) as unzipped:
                bounded = _Bounded(unzipped)
                bounded.grant(MAX_HEADER_BYTES)
                with tarfile.open(fileobj=bounded, mode="r:") as members:
                    for member in members:
                        self._tar_member(members, member, bounded)
        except _BROKEN as cause:
            raise _broken(cause) from cause

    def zip(self, archive: Path) -> None:
        try:
            with archive.open("rb") as opened, zipfile.ZipFile(_Bounded(opened)) as members:
                for member in members.infolist():
                    self._zip_member(members, member)
        except _BROKEN as cause:
            raise _broken(cause) from cause

    def _tar_member(self, members: tarfile.TarFile, member: tarfile.TarInfo, bounded: _Bounded) -> None:
        self._count(member.name)
        if member.isdir():
            bounded.grant(MAX_HEADER_BYTES)
            return
        if member.type not in {tarfile.REGTYPE, tarfile.AREGTYPE} or member.issparse():
            raise ArchiveError(f"{member.name!r} in the archive is no plain file")
        checked = tarfile.data_filter(member, str(self._folder))
        bounded.grant(member.size + MAX_HEADER_BYTES)
        source = members.extractfile(member)
        assert source is not None, "a plain file has content"
        self._write(checked.name, member.size, source)

    def _zip_member(self, members: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        self._count(member.filename)
        if member.is_dir():
            return
        if member.external_attr >> 28 not in {0, 0o10}:  # a mode of Unix, or nothing
            raise ArchiveError(f"{member.filename!r} in the archive is no plain file")
        with members.open(member) as source:
            self._write(member.filename, member.file_size, source)

    def _count(self, name: str) -> None:
        self._num_entries += 1
        if self._num_entries > self._limits.num_entries:
            raise ArchiveError(f"the archive has more than {self._limits.num_entries} entries")
        if len(name) > 256 or name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise ArchiveError(f"{name[:256]!r} in the archive leads elsewhere")

    def _write(self, path: str, num_bytes: int, source: IO[bytes]) -> None:
        parts = [part for part in path.split("/") if part != "."]
        name = parts[-1]
        if len(parts) > 2 or name not in KNOWN_FILES:
            raise ArchiveError(f"{path!r} in the archive is no file of an adapter: {', '.join(KNOWN_FILES)}")
        if name in self._seen:
            raise ArchiveError(f"{name} is in the archive twice")
        self._seen.add(name)
        self._num_bytes += num_bytes
        if self._num_bytes > self._limits.unpacked_bytes:
            raise ArchiveError(f"the archive unpacks to more than {self._limits.unpacked_bytes} bytes")
        self._room(num_bytes)
        self._copy(name, num_bytes, source)

    def _copy(self, name: str, num_bytes: int, source: IO[bytes]) -> None:
        left = num_bytes
        with (self._folder / name).open("wb") as out:
            while chunk := source.read(CHUNK_BYTES):
                left -= len(chunk)
                if left < 0:
                    break
                out.write(chunk)
                self._keep_time()
            out.flush()
            os.fsync(out.fileno())  # before the folder gets its name
        if left != 0:
            raise ArchiveError(f"{name} has not the {num_bytes} bytes that the archive announces")


class _Bounded(io.RawIOBase):
    """Python's readers take what an archive says of itself into memory, however much that is: here it has a limit.

    Of a zip one piece may be so long; of a tar all that is read before the next grant.
    """

    def __init__(self, opened: IO[bytes] | gzip.GzipFile) -> None:
        super().__init__()
        self._opened = opened
        self._left: int | None = None

    def grant(self, num_bytes: int) -> None:
        self._left = num_bytes

    def read(self, num_bytes: int = -1) -> bytes:
        allowed = CHUNK_BYTES if self._left is None else min(CHUNK_BYTES, self._left)
        data = self._opened.read(allowed + 1 if num_bytes < 0 else min(num_bytes, allowed + 1))
        if len(data) > allowed:
            raise ArchiveError(f"the archive says more than {MAX_HEADER_BYTES} bytes about a file")
        if self._left is not None:
            self._left -= len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET and offset < 0:  # a damaged archive says that a member begins there
            raise zipfile.BadZipFile("a member begins before the archive")
        return self._opened.seek(offset, whence)

    def tell(self) -> int:
        return self._opened.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def _broken(cause: Exception) -> ArchiveError:
    return cause if isinstance(cause, ArchiveError) else ArchiveError(f"the archive cannot be read ({cause})")
