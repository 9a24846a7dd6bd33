"""Takes an upload from its stream to a loaded adapter. Knows messages and order; where bytes go is `Uploads`' matter.

However a call ends before the last byte has come, what came stays, and another call goes on with it. From the last byte
on the work goes on without the client, because others may already see the adapter being loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from weakref import WeakValueDictionary

from gralora.v1 import adapters_pb2
from gralora_runtime.adapters.catalogue.manifest import Manifest
from gralora_runtime.adapters.catalogue.upload import Upload
from gralora_runtime.adapters.catalogue.uploads import Share, Uploads
from gralora_runtime.adapters.info import AdapterInfo, UnloadResult
from gralora_runtime.errors import (
    AdapterNotFoundError,
    AdapterUploadError,
    DrainingError,
    GraloraError,
    InvalidRequestError,
)
from gralora_server import convert, validation
from gralora_server.ports import Adapters
from gralora_server.tenants.metering import UploadMeter
from gralora_server.uninterrupted import uninterrupted

STALL_S = 60.0  # between two messages: who sends nothing for longer takes the place of others

Requests = AsyncIterator[adapters_pb2.UploadAdapterRequest]


class Uploading:
    """All uploads of a server: those of one name are loaded, or deleted, one after the other."""

    def __init__(self) -> None:
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._loading: set[asyncio.Task[AdapterInfo]] = set()  # the loop itself keeps no task alive

    async def receive(
        self, requests: Requests, adapters: Adapters, meter: UploadMeter, check_name: Callable[[str], None]
    ) -> AdapterInfo:
        """Everything until the adapter is loaded, or the reason why it is not.

        `check_name`: raises when the client may not send an adapter of that name.
        """
        first = await _next(requests, "")
        if first is None:
            raise InvalidRequestError("part", None, "must be a header here")
        validation.validate_upload_part(first, is_first=True)
        manifest = convert.from_upload_header(first.header)
        check_name(manifest.name)
        upload = await _begin(uploads_of(adapters, manifest.name), manifest, meter.share)
        try:
            while (request := await _next(requests, manifest.name)) is not None:
                validation.validate_upload_part(request, is_first=False)
                chunk = request.chunk
                await uninterrupted(asyncio.to_thread(upload.write, chunk.file, chunk.offset, chunk.data))
                meter.count(manifest.name, len(chunk.data))
        except BaseException:
            upload.close()
            raise
        loading = asyncio.create_task(self._load(upload, adapters, pin=first.header.pin))
        self._loading.add(loading)
        loading.add_done_callback(self._loading.discard)
        return await asyncio.shield(loading)

    async def unload_and_delete(self, name: str, adapters: Adapters) -> UnloadResult:
        """Nothing is left of what was uploaded under the name, whoever asked for that goes away meanwhile."""
        return await uninterrupted(self._unload_and_delete(name, adapters))

    async def _unload_and_delete(self, name: str, adapters: Adapters) -> UnloadResult:
        uploads = uploads_of(adapters, name)
        turn = self._turns.setdefault(name, asyncio.Lock())
        async with turn:
            if not await asyncio.to_thread(uploads.has, name):
                raise AdapterUploadError(name, "cannot be deleted: there is none")
            try:
                freed = await asyncio.to_thread(adapters.unload, name)
            except AdapterNotFoundError:  # unloaded before, and its upload stayed
                freed = UnloadResult(name=name, digest="", pool_bytes_freed=0, host_bytes_freed=0)
            await asyncio.to_thread(uploads.delete, name)
        return freed

    async def _load(self, upload: Upload, adapters: Adapters, *, pin: bool) -> AdapterInfo:
        manifest = upload.manifest
        uploads = uploads_of(adapters, manifest.name)
        turn = self._turns.setdefault(manifest.name, asyncio.Lock())
        async with turn:
            try:
                directory = await asyncio.to_thread(upload.finish)
            finally:
                upload.close()
            try:
                loading = await asyncio.to_thread(adapters.load, manifest.name, directory, pin=pin)
                info = await asyncio.wrap_future(loading)
            except BaseException as error:
                is_refused = isinstance(error, GraloraError) and not isinstance(error, DrainingError)
                await asyncio.to_thread(uploads.reject if is_refused else uploads.set_back, manifest)
                raise
            await asyncio.to_thread(uploads.accept, manifest)
            await asyncio.to_thread(adapters.flush)
        return info


def uploads_of(adapters: Adapters, name: str) -> Uploads:
    if adapters.uploads is None:
        raise AdapterUploadError(name, "cannot be kept: the server was started without a state directory")
    return adapters.uploads


async def _next(requests: Requests, name: str) -> adapters_pb2.UploadAdapterRequest | None:
    """None: the client has sent all."""
    try:
        async with asyncio.timeout(STALL_S):
            return await anext(requests, None)
    except TimeoutError as cause:
        raise AdapterUploadError(name, f"has stopped: nothing came for {STALL_S:g} s") from cause


async def _begin(uploads: Uploads, manifest: Manifest, share: Share | None) -> Upload:
    beginning = asyncio.ensure_future(asyncio.to_thread(uploads.begin, manifest, share))
    try:
        return await uninterrupted(beginning)
    except asyncio.CancelledError:
        if beginning.exception() is None:  # nobody else will
            beginning.result().close()
        raise
