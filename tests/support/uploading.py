"""Uploads as tests make them: what is announced, and the pieces that follow."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping

from gralora.v1 import adapters_pb2
from gralora_runtime.adapters.catalogue.manifest import Manifest, UploadFile
from gralora_runtime.adapters.catalogue.upload import Upload

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def contents(seed: int, num_bytes: int = 3000) -> dict[str, bytes]:
    """Files that are no adapter, but look like one from outside; each seed has its own."""
    return {CONFIG: f'{{"seed": {seed}}}'.encode(), WEIGHTS: hashlib.shake_128(str(seed).encode()).digest(num_bytes)}


def manifest_of(name: str, files: Mapping[str, bytes]) -> Manifest:
    described = [
        UploadFile(name=file, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for file, data in files.items()
    ]
    return Manifest(name=name, files=tuple(described))


def send(upload: Upload, files: Mapping[str, bytes], received: Mapping[str, int], *, step: int = 1000) -> None:
    for file, offset, data in pieces(files, received, step=step):
        upload.write(file, offset, data)


def pieces(
    files: Mapping[str, bytes], received: Mapping[str, int], *, step: int = 1000
) -> Iterator[tuple[str, int, bytes]]:
    for file, data in files.items():
        for offset in range(received.get(file, 0), len(data), step):
            yield file, offset, data[offset : offset + step]


def until(condition: Callable[[], object], limit_s: float = 15.0) -> None:
    """For what a server does when it comes to it. Waits in the calling thread, which is not the loop's."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def header_of(name: str, files: Mapping[str, bytes], *, pin: bool = False) -> adapters_pb2.AdapterUploadHeader:
    described = [
        adapters_pb2.AdapterUploadFile(name=file, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for file, data in files.items()
    ]
    return adapters_pb2.AdapterUploadHeader(name=name, pin=pin, files=described)


def chunk(file: str, offset: int, data: bytes) -> adapters_pb2.UploadAdapterRequest:
    return adapters_pb2.UploadAdapterRequest(chunk=adapters_pb2.AdapterUploadChunk(file=file, offset=offset, data=data))


def messages(
    name: str, files: Mapping[str, bytes], received: Mapping[str, int] | None = None, *, pin: bool = False
) -> list[adapters_pb2.UploadAdapterRequest]:
    """A whole call."""
    first = adapters_pb2.UploadAdapterRequest(header=header_of(name, files, pin=pin))
    return [first, *(chunk(*piece) for piece in pieces(files, received or {}))]
