"""The asyncio client: what awaits. What is sent and what comes back is in `requests` and `responses`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2

from gralora.v1 import adapters_pb2, generation_pb2
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.info import UnloadResult
from gralora_runtime.info import EngineLoad, TokenizeResult
from gralora_server.client import requests, responses
from gralora_server.client.base import ClientBase
from gralora_server.client.connection import RECONNECT_PAUSE_S, ChannelOptions
from gralora_server.client.errors import UnavailableError, client_error, cut_short, not_ready, passing_problem
from gralora_server.client.push import Progress, Push
from gralora_server.client.records import (
    Adapter,
    AdapterNews,
    Explanation,
    Generation,
    ServerActivity,
    ServerInfo,
    StreamDelta,
    TenantUsage,
)
from gralora_server.client.requests import Call, GenerateOptions, Message, Stubs, generate_fields
from gralora_server.client.responses import Assembler
from gralora_server.client.sync import open_channel as open_blocking_channel

T = TypeVar("T")


class AsyncGenerationStream(AsyncIterator[StreamDelta]):
    """Iterate for the deltas; `generation` is the whole once they are read. Leaving early cancels the request."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._assembler = Assembler()
        self._closed = False
        self._loop = asyncio.get_running_loop()

    def __del__(self) -> None:
        """A stream that was dropped, as by `break`: asyncio's calls, unlike the synchronous ones, would go on."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._call.cancel)

    async def __anext__(self) -> StreamDelta:
        if self._closed:
            raise StopAsyncIteration
        try:
            message = await self._call.read()
        except grpc.RpcError as error:
            raise client_error(error) from error
        if message is not grpc.aio.EOF:  # type: ignore[attr-defined]
            return self._assembler.add(message)
        if self._assembler.whole() is None:
            raise cut_short()
        raise StopAsyncIteration

    @property
    def request_id(self) -> str:
        """Empty until the first message has come."""
        return self._assembler.request_id

    @property
    def generation(self) -> Generation:
        """Raises RuntimeError while the stream has not been read to its end."""
        whole = self._assembler.whole()
        if whole is None:
            raise RuntimeError("the stream was not read to its end")
        return whole

    async def read(self) -> Generation:
        """Read what is left and return the whole."""
        async for _ in self:
            pass
        return self.generation

    async def aclose(self) -> None:
        """Cancels the request if it still runs."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncAdapterClient:
    """`AsyncClient.adapters`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self, prefix: str = "", *, states: Iterable[AdapterState] = ()) -> tuple[Adapter, ...]:
        """All whose names begin so and that are in one of the states; no states: in any."""
        wanted = tuple(states)
        found, token = await self._client.run(requests.list_adapters(prefix, wanted, ""))
        while token:
            more, token = await self._client.run(requests.list_adapters(prefix, wanted, token))
            found += more
        return found

    async def get(self, name: str) -> Adapter:
        return await self._client.run(requests.get_adapter(name))

    async def load(self, name: str, path: str | Path | None = None, *, pin: bool = False) -> Adapter:
        """`path` is on the server, below its adapters directory; None: the name says it."""
        return await self._client.run(requests.load_adapter(name, path, pin))

    async def push(
        self, directory: str | Path, name: str, *, pin: bool = False, progress: Progress | None = None
    ) -> Adapter:
        """Send an adapter directory of this machine, and load it. A push that broke off goes on where it was.

        Files are read, and `progress` is called, in threads.
        """
        push = await asyncio.to_thread(Push.of, directory, name, pin=pin, progress=progress)
        try:
            return await self._client.push(push)
        except UnavailableError:
            return await self._client.push(push)

    async def unload(self, name: str, *, delete_upload: bool = False) -> UnloadResult:
        """`delete_upload`: and what was pushed under that name."""
        return await self._client.run(requests.unload_adapter(name, delete_upload))

    async def pin(self, name: str, *, pinned: bool = True) -> Adapter:
        return await self._client.run(requests.pin_adapter(name, pinned))

    async def promote(self, name: str, version: str = "") -> Adapter:
        """Let the name stand for a version: "3" or "sha256:0123456789ab"; "": the newest."""
        return await self._client.run(requests.promote_adapter(name, version))

    async def rollback(self, name: str) -> Adapter:
        """Let the name stand for what it stood for before."""
        return await self._client.run(requests.rollback_adapter(name))

    async def set_canary(self, name: str, version: str, share: float) -> Adapter:
        """Give a version a share of the name's requests, 0 to 1. 0 ends it."""
        return await self._client.run(requests.set_adapter_canary(name, version, share))

    async def watch(self, prefix: str = "") -> AsyncIterator[AdapterNews]:
        """What there is, then each change, until the server drains (UnavailableError) or you stop reading."""
        call = self._client.watch(prefix)
        try:
            async for message in call:
                yield responses.adapter_news(message)
        except grpc.RpcError as error:
            raise client_error(error) from error
        finally:
            call.cancel()


async def _result(call: Any) -> Any:
    """Of a call that threads of gRPC's carry out; it is cancelled if the wait is."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def wake(_: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(done.set)

    call.add_done_callback(wake)
    try:
        await done.wait()
    finally:
        call.cancel()
    return call.result()


def open_channel(target: str, credentials: grpc.ChannelCredentials | None, options: ChannelOptions) -> grpc.aio.Channel:
    """On the running event loop, with TLS if there are credentials."""
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, options=options)


class AsyncClient(ClientBase[grpc.aio.Channel]):
    """A server, from asyncio code; made on the event loop that uses it. Every failure is a `GraloraClientError`."""

    def _open(
        self, target: str, credentials: grpc.ChannelCredentials | None, options: ChannelOptions
    ) -> grpc.aio.Channel:
        return open_channel(target, credentials, options)

    @property
    def adapters(self) -> AsyncAdapterClient:
        return AsyncAdapterClient(self)

    async def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Generate and wait for the whole. Exactly one of `prompt`, `token_ids` and `messages`."""
        request = generation_pb2.GenerateRequest(**generate_fields(prompt, token_ids, messages, options))
        assembler = Assembler()
        try:
            assembler.add(await self._stubs.generation.Generate(request, **self._generate_arguments(options)))
        except grpc.RpcError as error:
            raise client_error(error) from error
        whole = assembler.whole(streamed=False)
        if whole is None:
            raise cut_short()
        return whole

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerationStream:
        """Generate and iterate over what comes. Exactly one of `prompt`, `token_ids` and `messages`."""
        request = generation_pb2.StreamGenerateRequest(**generate_fields(prompt, token_ids, messages, options))
        call = self._stubs.generation.StreamGenerate(request, **self._generate_arguments(options))
        return AsyncGenerationStream(call)

    async def tokenize(self, prompt: str | None = None, *, messages: Sequence[Message] | None = None) -> TokenizeResult:
        return await self.run(requests.tokenize(prompt, messages))

    async def abort(self, request_id: str) -> bool:
        """Whether a request of that id was running or waiting."""
        return await self.run(requests.abort(request_id))

    async def explain(self, request_id: str) -> Explanation | None:
        """Where the time of a recent request went; None if there is none of that id, or too many came since."""
        return await self.run(requests.explain(request_id))

    async def info(self) -> ServerInfo:
        return await self.run(requests.get_info())

    async def load(self) -> EngineLoad:
        return await self.run(requests.get_load())

    async def activity(self) -> ServerActivity:
        """What the server is doing now, and every request under way. For an admin."""
        return await self.run(requests.get_activity())

    async def reload_config(self) -> tuple[str, ...]:
        """What changed at the top of the server's configuration file. For an admin."""
        return await self.run(requests.reload_config())

    async def usage(self, tenant: str | None = None) -> tuple[TenantUsage, ...]:
        """What was used so far, by tenant and adapter. `tenant` None: by all that the caller may see."""
        found, token = await self.run(requests.get_usage(tenant, ""))
        while token:
            more, token = await self.run(requests.get_usage(tenant, token))
            found += more
        return found

    async def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Return when the server takes requests, or raise DeadlineError. It need not be listening yet."""
        end_s = time.monotonic() + timeout_s
        last = "no connection"
        while (remaining_s := end_s - time.monotonic()) > 0:
            watch = self._stubs.health.Watch(
                health_pb2.HealthCheckRequest(), timeout=remaining_s, metadata=self._metadata, wait_for_ready=True
            )
            try:
                async for answer in watch:
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                    last = "it is starting or shutting down"
            except grpc.RpcError as error:
                last = passing_problem(error, last)
            finally:
                watch.cancel()
            await asyncio.sleep(RECONNECT_PAUSE_S)
        raise not_ready(timeout_s, last)

    def watch(self, prefix: str) -> Any:
        """The raw call of `adapters.watch`."""
        return self._stubs.adapters.WatchAdapters(
            adapters_pb2.WatchAdaptersRequest(prefix=prefix), metadata=self._metadata
        )

    async def push(self, push: Push) -> Adapter:
        """What the server lacks of it, in one call."""
        received = await self.run(requests.get_adapter_upload(push.header))
        # Not by grpc.aio: of a stream that the server ends while we write, it may forget why (grpc/grpc#36066).
        connection = self._connection
        channel = open_blocking_channel(connection.target, connection.credentials(), connection.channel_options())
        try:
            call = Stubs(channel).adapters.UploadAdapter.future(push.messages(received), **self._push_arguments())
            answer = await _result(call)
        except grpc.RpcError as error:
            raise client_error(error) from error
        finally:
            channel.close()
        return responses.described_adapter(answer)

    async def run(self, call: Call[T]) -> T:
        try:
            answer = await call.rpc(self._stubs)(call.message, **self._call_arguments(call))
        except grpc.RpcError as error:
            raise client_error(error) from error
        return call.convert(answer)

    async def close(self) -> None:
        """Cancels what still runs."""
        await self._channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
