"""An adapter directory as it is pushed to a server: its header, and the pieces that the server lacks. Sends nothing."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

from gralora.v1 import adapters_pb2
from gralora_runtime.adapters.catalogue.manifest import UPLOADED_FILES
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.adapters.checkpoint.mending import name_instead

CHUNK_BYTES = 256 << 10
HASHED_BYTES = 1 << 20

Progress = Callable[[int, int], None]  # bytes that are there or under way, bytes of all files


class Push:
    """The files of one directory as they were when it was made; one that changes later is refused by the server."""

    def __init__(self, directory: Path, header: adapters_pb2.AdapterUploadHeader, progress: Progress | None) -> None:
        self.header = header
        self._directory = directory
        self._progress = progress
        self._total = sum(file.size for file in header.files)

    @classmethod
    def of(cls, directory: str | Path, name: str, *, pin: bool, progress: Progress | None) -> Self:
        """Reads and hashes all files. Raises FileNotFoundError where there is no adapter."""
        directory = Path(directory)
        if not (directory / CONFIG_FILE).is_file():
            problem = os.strerror(errno.ENOENT) + name_instead(directory, CONFIG_FILE)
            raise FileNotFoundError(errno.ENOENT, problem, str(directory / CONFIG_FILE))
        paths = [path for file in UPLOADED_FILES if (path := directory / file).is_file()]
        header = adapters_pb2.AdapterUploadHeader(name=name, pin=pin, files=[_described(path) for path in paths])
        return cls(directory, header, progress)

    def messages(self, received: Mapping[str, int]) -> Iterator[adapters_pb2.UploadAdapterRequest]:
        """The header, and what is behind the bytes that the server has."""
        done = sum(received.values())
        self._tell(done)
        yield adapters_pb2.UploadAdapterRequest(header=self.header)
        for file in self.header.files:
            for chunk in self._chunks(file.name, received.get(file.name, 0)):
                yield adapters_pb2.UploadAdapterRequest(chunk=chunk)
                done += len(chunk.data)
                self._tell(done)

    def _chunks(self, file: str, offset: int) -> Iterator[adapters_pb2.AdapterUploadChunk]:
        with (self._directory / file).open("rb") as opened:
            opened.seek(offset)
            while data := opened.read(CHUNK_BYTES):
                yield adapters_pb2.AdapterUploadChunk(file=file, offset=offset, data=data)
                offset += len(data)

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, self._total)


def _described(path: Path) -> adapters_pb2.AdapterUploadFile:
    hasher, size = hashlib.sha256(), 0
    with path.open("rb") as opened:
        while piece := opened.read(HASHED_BYTES):
            hasher.update(piece)
            size += len(piece)
    return adapters_pb2.AdapterUploadFile(name=path.name, size=size, sha256=hasher.hexdigest())
