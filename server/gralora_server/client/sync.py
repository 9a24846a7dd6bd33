"""The synchronous client: what waits. What is sent and what comes back is in `requests` and `responses`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
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
from gralora_server.client.requests import Call, GenerateOptions, Message, generate_fields
from gralora_server.client.responses import Assembler

T = TypeVar("T")


class GenerationStream(Iterator[StreamDelta]):
    """Iterate for the deltas; `generation` is the whole once they are read. Leaving early cancels the request."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._assembler = Assembler()
        self._closed = False

    def __next__(self) -> StreamDelta:
        if self._closed:
            raise StopIteration
        try:
            return self._assembler.add(next(self._call))
        except StopIteration:
            if self._assembler.whole() is None:
                raise cut_short() from None
            raise
        except grpc.RpcError as error:
            raise client_error(error) from error

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

    def read(self) -> Generation:
        """Read what is left and return the whole."""
        for _ in self:
            pass
        return self.generation

    def close(self) -> None:
        """Cancels the request if it still runs."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AdapterClient:
    """`Client.adapters`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, prefix: str = "", *, states: Iterable[AdapterState] = ()) -> tuple[Adapter, ...]:
        """All whose names begin so and that are in one of the states; no states: in any."""
        wanted = tuple(states)
        found, token = self._client.run(requests.list_adapters(prefix, wanted, ""))
        while token:
            more, token = self._client.run(requests.list_adapters(prefix, wanted, token))
            found += more
        return found

    def get(self, name: str) -> Adapter:
        return self._client.run(requests.get_adapter(name))

    def load(self, name: str, path: str | Path | None = None, *, pin: bool = False) -> Adapter:
        """`path` is on the server, below its adapters directory; None: the name says it."""
        return self._client.run(requests.load_adapter(name, path, pin))

    def push(self, directory: str | Path, name: str, *, pin: bool = False, progress: Progress | None = None) -> Adapter:
        """Send an adapter directory of this machine, and load it. A push that broke off goes on where it was."""
        push = Push.of(directory, name, pin=pin, progress=progress)
        try:
            return self._client.push(push)
        except UnavailableError:
            return self._client.push(push)

    def unload(self, name: str, *, delete_upload: bool = False) -> UnloadResult:
        """`delete_upload`: and what was pushed under that name."""
        return self._client.run(requests.unload_adapter(name, delete_upload))

    def pin(self, name: str, *, pinned: bool = True) -> Adapter:
        return self._client.run(requests.pin_adapter(name, pinned))

    def promote(self, name: str, version: str = "") -> Adapter:
        """Let the name stand for a version: "3" or "sha256:0123456789ab"; "": the newest."""
        return self._client.run(requests.promote_adapter(name, version))

    def rollback(self, name: str) -> Adapter:
        """Let the name stand for what it stood for before."""
        return self._client.run(requests.rollback_adapter(name))

    def set_canary(self, name: str, version: str, share: float) -> Adapter:
        """Give a version a share of the name's requests, 0 to 1. 0 ends it."""
        return self._client.run(requests.set_adapter_canary(name, version, share))

    def watch(self, prefix: str = "") -> Iterator[AdapterNews]:
        """What there is, then each change, until the server drains (UnavailableError) or you stop reading."""
        call = self._client.watch(prefix)
        try:
            for message in call:
                yield responses.adapter_news(message)
        except grpc.RpcError as error:
            raise client_error(error) from error
        finally:
            call.cancel()


def open_channel(target: str, credentials: grpc.ChannelCredentials | None, options: ChannelOptions) -> grpc.Channel:
    """With TLS if there are credentials."""
    if credentials is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, credentials, options=options)


class Client(ClientBase[grpc.Channel]):
    """A server, from synchronous code. Every failure is a `GraloraClientError`."""

    def _open(self, target: str, credentials: grpc.ChannelCredentials | None, options: ChannelOptions) -> grpc.Channel:
        return open_channel(target, credentials, options)

    @property
    def adapters(self) -> AdapterClient:
        return AdapterClient(self)

    def generate(
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
            assembler.add(self._stubs.generation.Generate(request, **self._generate_arguments(options)))
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
    ) -> GenerationStream:
        """Generate and iterate over what comes. Exactly one of `prompt`, `token_ids` and `messages`."""
        request = generation_pb2.StreamGenerateRequest(**generate_fields(prompt, token_ids, messages, options))
        return GenerationStream(self._stubs.generation.StreamGenerate(request, **self._generate_arguments(options)))

    def tokenize(self, prompt: str | None = None, *, messages: Sequence[Message] | None = None) -> TokenizeResult:
        return self.run(requests.tokenize(prompt, messages))

    def abort(self, request_id: str) -> bool:
        """Whether a request of that id was running or waiting."""
        return self.run(requests.abort(request_id))

    def explain(self, request_id: str) -> Explanation | None:
        """Where the time of a recent request went; None if there is none of that id, or too many came since."""
        return self.run(requests.explain(request_id))

    def info(self) -> ServerInfo:
        return self.run(requests.get_info())

    def load(self) -> EngineLoad:
        return self.run(requests.get_load())

    def activity(self) -> ServerActivity:
        """What the server is doing now, and every request under way. For an admin."""
        return self.run(requests.get_activity())

    def reload_config(self) -> tuple[str, ...]:
        """What changed at the top of the server's configuration file. For an admin."""
        return self.run(requests.reload_config())

    def usage(self, tenant: str | None = None) -> tuple[TenantUsage, ...]:
        """What was used so far, by tenant and adapter. `tenant` None: by all that the caller may see."""
        found, token = self.run(requests.get_usage(tenant, ""))
        while token:
            more, token = self.run(requests.get_usage(tenant, token))
            found += more
        return found

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Return when the server takes requests, or raise DeadlineError. It need not be listening yet."""
        end_s = time.monotonic() + timeout_s
        last = "no connection"
        while (remaining_s := end_s - time.monotonic()) > 0:
            watch = self._stubs.health.Watch(
                health_pb2.HealthCheckRequest(), timeout=remaining_s, metadata=self._metadata, wait_for_ready=True
            )
            try:
                for answer in watch:
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                    last = "it is starting or shutting down"
            except grpc.RpcError as error:
                last = passing_problem(error, last)
            finally:
                watch.cancel()
            time.sleep(RECONNECT_PAUSE_S)
        raise not_ready(timeout_s, last)

    def watch(self, prefix: str) -> Any:
        """The raw call of `adapters.watch`."""
        return self._stubs.adapters.WatchAdapters(
            adapters_pb2.WatchAdaptersRequest(prefix=prefix), metadata=self._metadata
        )

    def push(self, push: Push) -> Adapter:
        """What the server lacks of it, in one call."""
        received = self.run(requests.get_adapter_upload(push.header))
        try:
            answer = self._stubs.adapters.UploadAdapter(push.messages(received), **self._push_arguments())
        except grpc.RpcError as error:
            raise client_error(error) from error
        return responses.described_adapter(answer)

    def run(self, call: Call[T]) -> T:
        try:
            answer = call.rpc(self._stubs)(call.message, **self._call_arguments(call))
        except grpc.RpcError as error:
            raise client_error(error) from error
        return call.convert(answer)

    def close(self) -> None:
        """Cancels what still runs."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
