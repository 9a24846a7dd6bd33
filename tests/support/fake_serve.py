"""Serve's gRPC proxy as far as it can be told from outside, in front of replicas in this process. Has no Ray.

As Serve does, it replaces the handlers that a servicer function adds, tells a replica a method's last name alone, hands
its context over as a copy, and carries code, message and trailers back with messages only.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

import grpc
from support.fake_engine import FakeEngine
from support.grpc_harness import Client

from gralora_server.config import ServerConfig
from gralora_server.parts import Parts
from gralora_server.ray.answering import Answering
from gralora_server.ray.ingress import add_kserve, add_services
from gralora_server.ray.rpcs import rpcs
from gralora_server.settings.reloader import Reloader

RPCS = rpcs(kserve=True)
MAKE = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class FakeContext:
    """As `RayServegRPCContext`: what a replica reads and sets of a call."""

    def __init__(self, metadata: tuple[tuple[str, str | bytes], ...] = ()) -> None:
        self.metadata = metadata
        self.told: dict[str, Any] = {}

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self.metadata

    def code(self) -> grpc.StatusCode | int:
        return self.told.get("code", 0)

    def set_code(self, code: grpc.StatusCode) -> None:
        self.told["code"] = code

    def set_details(self, details: str) -> None:
        self.told["details"] = details

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str | bytes]]) -> None:
        self.told["trailers"] = [("request_id", "serve's own"), *trailing_metadata]

    def set_on(self, context: Any) -> None:
        if "code" in self.told:
            context.set_code(self.told["code"])
            context.set_details(self.told["details"])
        context.set_trailing_metadata(self.told["trailers"])


@dataclass
class FakeServe:
    """`route` says which replica a call goes to, by its metadata."""

    server: Any
    route: Callable[[Mapping[str, Any]], Answering]
    is_lost: bool = False  # the replica dies with its next message
    metadata: list[dict[str, Any]] = field(default_factory=list)  # of all calls

    def service_handler_factory(self, *, service_method: str, streams: bool) -> Callable[[Any, Any], Any]:
        rpc = RPCS[service_method.rpartition("/")[2]]

        async def answer(request: Any, context: Any) -> bytes:
            replica, told = self._enter(context)
            try:
                answered = await replica.answer(rpc.path, request, told)
                self._die()
            except ActorDiedError as error:
                return _internal(context, error)
            told.set_on(context)
            return answered.SerializeToString()

        async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
            replica, told = self._enter(context)
            try:
                async for message in replica.messages(rpc.path, request, told):
                    self._die()
                    copy.copy(told).set_on(context)
                    yield message.SerializeToString()
            except ActorDiedError as error:
                _internal(context, error)

        return stream if streams else answer

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The registered ones once more."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        replaced = {
            name: MAKE[handler.request_streaming, handler.response_streaming](
                self.service_handler_factory(service_method=f"/{service}/{name}", streams=handler.response_streaming),
                handler.request_deserializer,
                None,
            )
            for name, handler in handlers.items()
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, replaced),))

    def _enter(self, context: Any) -> tuple[Answering, FakeContext]:
        metadata = tuple(context.invocation_metadata())
        self.metadata.append(dict(metadata))
        return self.route(dict(metadata)), FakeContext(metadata)

    def _die(self) -> None:
        if self.is_lost:
            raise ActorDiedError("The actor died unexpectedly before finishing this task.")


class ActorDiedError(Exception):
    """What Ray raises in a proxy."""


def _internal(context: Any, error: Exception) -> bytes:
    context.set_code(grpc.StatusCode.INTERNAL)
    context.set_details(str(error))
    return b""


@dataclass(frozen=True, slots=True)
class Behind:
    """One replica behind a proxy."""

    serve: FakeServe
    parts: Parts
    engine: FakeEngine
    client: Client


@asynccontextmanager
async def proxied(route: Callable[[Mapping[str, Any]], Answering]) -> AsyncIterator[tuple[FakeServe, Client]]:
    server = grpc.aio.server()
    serve = FakeServe(server, route)
    add_services(Mock(), serve)
    add_kserve(Mock(), serve)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = (("grpc.use_local_subchannel_pool", 1),)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield serve, Client(channel)
    finally:
        await server.stop(0)


@asynccontextmanager
async def behind_serve(reloader: Reloader | None = None, **settings: Any) -> AsyncIterator[Behind]:
    """A replica with a fake engine, and a client of the proxy."""
    parts, engine = Parts(ServerConfig(**settings), reloader), FakeEngine()
    await parts.open(engine)
    answering = Answering(parts, "the-replica")
    async with proxied(lambda _: answering) as (serve, client):
        yield Behind(serve, parts, engine, client)
    await parts.close()
