"""The RPCs: validate, convert, call the engine, answer. Errors leave as exceptions; the interceptor makes statuses.

Streaming methods are coroutines that write to the context rather than generators: cancellation then arrives at an
`await` of theirs, and a write can be bounded in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from gralora.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from gralora_runtime.errors import DrainingError
from gralora_runtime.request import Delta
from gralora_server import convert, validation
from gralora_server.delivery import Write, collect, deliver
from gralora_server.errors import PermissionDeniedError, StartingError
from gralora_server.gate import Gate, Phase
from gralora_server.generating import Generating
from gralora_server.sending import send
from gralora_server.settings.reloader import Reloader
from gralora_server.tenants.caller import Caller, current
from gralora_server.tenants.metering import Metering
from gralora_server.tenants.request_ids import as_asked
from gralora_server.tenants.rights import Rights
from gralora_server.tenants.settings import Role
from gralora_server.tenants.suggestions import suggesting
from gralora_server.tenants.usage import Usage
from gralora_server.uploading import Uploading, uploads_of
from gralora_server.watching import Watching
from gralora_server.waterfalls import to_explanation

DEFAULT_PAGE_SIZE = 500
WATCHED_AT_ONCE = 100  # adapters in one message
RECHECK_S = 1.0  # so long a watch goes on at most once its caller may not watch any more
WATCH_PAUSE_S = 0.05  # what changes meanwhile is one change

Context = grpc.aio.ServicerContext[Any, Any]
NO_CONTEXT: Any = None  # for those who call a method of ours from elsewhere: the unary ones but Generate look at none


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """What `Generating` answers, as messages."""

    def __init__(self, generating: Generating, *, write_timeout_s: float) -> None:
        self._generating = generating
        self._write_timeout_s = write_timeout_s

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        async with self._generating.opened(request, remaining_s=context.time_remaining()) as answer:
            return convert.to_response(await collect(answer), request_id=request.request_id)

    async def StreamGenerate(  # type: ignore[override]  # the stubs know generators only
        self, request: generation_pb2.StreamGenerateRequest, context: Context
    ) -> None:
        async with self._generating.opened(request, remaining_s=context.time_remaining()) as answer:
            # Tells routers that the request was taken, long before its first token.
            await context.send_initial_metadata(())
            await deliver(
                answer,
                writing(context, request.request_id),
                request_id=request.request_id,
                min_tokens=convert.to_min_tokens_per_message(request.response),
                write_timeout_s=self._write_timeout_s,
                on_slow=answer.hold,
                on_read=answer.go_on,
            )


def writing(context: Context, request_id: str) -> Write:
    """Deltas to a stream of messages, of which the first says the request's id."""
    announced = request_id

    async def write(delta: Delta) -> None:
        nonlocal announced
        message = convert.to_stream_response(delta, request_id=announced)
        announced = ""
        await send(context, message)

    return write


class AdapterServicer(adapters_pb2_grpc.AdapterServiceServicer):
    """The catalogue takes locks that a loading thread may hold for a moment, so it is never called on the loop."""

    def __init__(self, gate: Gate, rights: Rights, metering: Metering) -> None:
        self._gate = gate
        self._rights = rights
        self._metering = metering
        self._uploading = Uploading()

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, _context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        validation.validate_list(request)
        return await asyncio.to_thread(self._page, request, self._rights.sees())

    async def every(self) -> list[adapters_pb2.Adapter]:
        """All that the caller sees, without their versions, for those who know no pages."""
        request = adapters_pb2.ListAdaptersRequest(page_size=validation.MAX_PAGE_SIZE)
        found: list[adapters_pb2.Adapter] = []
        while True:
            page = await self.ListAdapters(request, NO_CONTEXT)
            found += page.adapters
            request.page_token = page.next_page_token
            if not request.page_token:
                return found

    def _page(
        self, request: adapters_pb2.ListAdaptersRequest, sees: Callable[[str], bool]
    ) -> adapters_pb2.ListAdaptersResponse:
        page = self._gate.engine.adapters.page(
            size=request.page_size or DEFAULT_PAGE_SIZE,
            after=request.page_token,
            prefix=request.prefix,
            states=convert.from_states(request.states),
            sees=sees,
        )
        return adapters_pb2.ListAdaptersResponse(
            adapters=[convert.to_adapter(info) for info in page.adapters],
            next_page_token=page.next_after,
            total_size=page.total,
        )

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, _context: Context
    ) -> adapters_pb2.GetAdapterResponse:
        validation.validate_name(request.name)
        self._rights.check_see(request.name)
        info = await asyncio.to_thread(self._gate.engine.adapters.get, request.name)
        return adapters_pb2.GetAdapterResponse(adapter=convert.to_adapter(info))

    async def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, _context: Context
    ) -> adapters_pb2.LoadAdapterResponse:
        with self._gate.admit() as engine:
            validation.validate_load(request)
            self._rights.check_create(request.name)
            if request.path:
                self._rights.check_path()
            path = Path(request.path) if request.path else None
            async with suggesting(engine.adapters, self._rights.sees()):
                loading = await asyncio.to_thread(engine.adapters.load, request.name, path, pin=request.pin)
                # Shielded: others may wait for the same load, so it goes on when this client leaves.
                info = await asyncio.shield(asyncio.wrap_future(loading))
            await asyncio.to_thread(engine.adapters.flush)
        return adapters_pb2.LoadAdapterResponse(adapter=convert.to_adapter(info))

    async def UploadAdapter(
        self, requests: AsyncIterator[adapters_pb2.UploadAdapterRequest], _context: Context
    ) -> adapters_pb2.UploadAdapterResponse:
        with self._gate.admit() as engine, self._metering.upload(current()) as meter:
            info = await self._uploading.receive(requests, engine.adapters, meter, self._rights.check_create)
        return adapters_pb2.UploadAdapterResponse(adapter=convert.to_adapter(info))

    async def GetAdapterUpload(
        self, request: adapters_pb2.GetAdapterUploadRequest, _context: Context
    ) -> adapters_pb2.GetAdapterUploadResponse:
        validation.validate_upload_header(request.header)
        manifest = convert.from_upload_header(request.header)
        self._rights.check_create(manifest.name)
        uploads = uploads_of(self._gate.engine.adapters, manifest.name)
        return convert.to_received(await asyncio.to_thread(uploads.received, manifest))

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, _context: Context
    ) -> adapters_pb2.UnloadAdapterResponse:
        validation.validate_unload(request)
        self._rights.check_manage(request.name)
        adapters = self._gate.engine.adapters
        if request.delete_upload:
            return convert.to_unloaded(await self._uploading.unload_and_delete(request.name, adapters))
        return convert.to_unloaded(await asyncio.to_thread(adapters.unload, request.name))

    async def PinAdapter(
        self, request: adapters_pb2.PinAdapterRequest, _context: Context
    ) -> adapters_pb2.PinAdapterResponse:
        validation.validate_name(request.name)
        self._rights.check_manage(request.name)
        info = await asyncio.to_thread(self._gate.engine.adapters.pin, request.name, request.pinned)
        return adapters_pb2.PinAdapterResponse(adapter=convert.to_adapter(info))

    async def PromoteAdapter(
        self, request: adapters_pb2.PromoteAdapterRequest, _context: Context
    ) -> adapters_pb2.PromoteAdapterResponse:
        validation.validate_version(request.name, request.version)
        self._rights.check_manage(request.name)
        info = await asyncio.to_thread(self._gate.engine.adapters.promote, request.name, request.version)
        return adapters_pb2.PromoteAdapterResponse(adapter=convert.to_adapter(info))

    async def RollbackAdapter(
        self, request: adapters_pb2.RollbackAdapterRequest, _context: Context
    ) -> adapters_pb2.RollbackAdapterResponse:
        validation.validate_name(request.name)
        self._rights.check_manage(request.name)
        info = await asyncio.to_thread(self._gate.engine.adapters.roll_back, request.name)
        return adapters_pb2.RollbackAdapterResponse(adapter=convert.to_adapter(info))

    async def SetAdapterCanary(
        self, request: adapters_pb2.SetAdapterCanaryRequest, _context: Context
    ) -> adapters_pb2.SetAdapterCanaryResponse:
        validation.validate_version(request.name, request.version)
        self._rights.check_manage(request.name)
        info = await asyncio.to_thread(
            self._gate.engine.adapters.set_canary, request.name, request.version, request.share
        )
        return adapters_pb2.SetAdapterCanaryResponse(adapter=convert.to_adapter(info))

    async def WatchAdapters(  # type: ignore[override]  # the stubs know generators only
        self, request: adapters_pb2.WatchAdaptersRequest, context: Context
    ) -> None:
        """Ends when the client leaves or may not watch any more, or the server drains."""
        validation.validate_prefix(request.prefix)
        loop, adapters = asyncio.get_running_loop(), self._gate.engine.adapters

        def wake() -> None:
            loop.call_soon_threadsafe(woken.set)

        with self._gate.listen() as woken:
            watching = Watching(self._rights, partial(adapters.watch, request.prefix, wake))
            try:
                while self._gate.phase is Phase.SERVING:
                    woken.clear()
                    news = await watching.take(WATCHED_AT_ONCE)
                    if news is None:
                        with suppress(TimeoutError):
                            await asyncio.wait_for(woken.wait(), RECHECK_S)
                        continue
                    await context.write(convert.to_news(news))
                    if news.synced:
                        await asyncio.sleep(WATCH_PAUSE_S)
            finally:
                watching.close()
        raise DrainingError


class ServerServicer(server_pb2_grpc.ServerServiceServicer):
    """All of it is allowed while draining."""

    def __init__(self, gate: Gate, rights: Rights, reloader: Reloader, usage: Usage) -> None:
        self._gate = gate
        self._rights = rights
        self._reloader = reloader
        self._usage = usage

    async def GetServerInfo(
        self, _request: server_pb2.GetServerInfoRequest, _context: Context
    ) -> server_pb2.GetServerInfoResponse:
        return convert.to_server_info(self._gate.engine.info())

    async def GetLoad(self, _request: server_pb2.GetLoadRequest, _context: Context) -> server_pb2.GetLoadResponse:
        return convert.to_load(self._gate.engine.load())

    async def GetUsage(self, request: server_pb2.GetUsageRequest, _context: Context) -> server_pb2.GetUsageResponse:
        if self._gate.phase is Phase.STARTING:
            raise StartingError  # what was kept may not be back yet
        validation.validate_usage(request)
        tenant = seen_tenant(current(), request.tenant if request.HasField("tenant") else None)
        size = request.page_size or DEFAULT_PAGE_SIZE
        rows = self._usage.rows(tenant=tenant, first=convert.from_usage_token(request.page_token), limit=size + 1)
        return convert.to_usage(rows, size)

    async def Tokenize(self, request: server_pb2.TokenizeRequest, _context: Context) -> server_pb2.TokenizeResponse:
        validation.validate_tokenize(request)
        result = await self._gate.engine.tokenize(convert.from_prompt(request))
        return server_pb2.TokenizeResponse(token_ids=result.token_ids, max_model_len=result.max_model_len)

    async def AbortRequest(
        self, request: server_pb2.AbortRequestRequest, _context: Context
    ) -> server_pb2.AbortRequestResponse:
        validation.validate_named_request(request)
        engine = self._gate.engine
        aborted = [engine.abort(request_id) for request_id in self._rights.ids_of(request.request_id)]
        return server_pb2.AbortRequestResponse(aborted=any(aborted))

    async def ExplainRequest(
        self, request: server_pb2.ExplainRequestRequest, _context: Context
    ) -> server_pb2.ExplainRequestResponse:
        validation.validate_named_request(request)
        timelines = self._gate.engine.timelines
        known = [timelines.find(request_id) for request_id in self._rights.ids_of(request.request_id)]
        newest = max(filter(None, known), key=lambda timeline: timeline.received_s, default=None)
        return to_explanation(newest, request.request_id, self._rights.shown())

    async def GetActivity(
        self, _request: server_pb2.GetActivityRequest, _context: Context
    ) -> server_pb2.GetActivityResponse:
        engine = self._gate.engine
        return convert.to_activity(engine.activity(), map(as_asked, engine.under_way()))

    async def ReloadConfig(
        self, _request: server_pb2.ReloadConfigRequest, _context: Context
    ) -> server_pb2.ReloadConfigResponse:
        # Shielded: a client that leaves in between leaves no half of it behind.
        return server_pb2.ReloadConfigResponse(changed=await asyncio.shield(self._reloader.reload()))


def seen_tenant(caller: Caller, asked: str | None) -> str | None:
    """Whose usage the caller is told; None: everybody's."""
    if caller.role is Role.ADMIN:
        return asked
    if asked not in (None, caller.tenant):
        raise PermissionDeniedError("GetUsage for another tenant")
    return caller.tenant
