"""A real server on a random loopback port in front of a fake engine, and what a client sees when a call fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2_grpc
from support.fake_engine import FakeEngine

from gralora.foreign import kserve_pb2_grpc, vllm_pb2_grpc
from gralora.v1 import (
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2_grpc,
)
from gralora_server.config import ServerConfig
from gralora_server.service import GrpcServer
from gralora_server.settings.reloader import Reloader

DETAIL_TYPES = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.ResourceInfo,
    error_details_pb2.QuotaFailure,
)


@dataclass(frozen=True, slots=True)
class Client:
    """Stubs of every service, on one channel."""

    channel: grpc.aio.Channel
    generation: generation_pb2_grpc.GenerationServiceStub = field(init=False)
    adapters: adapters_pb2_grpc.AdapterServiceStub = field(init=False)
    server: server_pb2_grpc.ServerServiceStub = field(init=False)
    health: health_pb2_grpc.HealthStub = field(init=False)
    # Of servers that have them.
    kserve: kserve_pb2_grpc.GRPCInferenceServiceStub = field(init=False)
    inference: vllm_pb2_grpc.InferenceStub = field(init=False)
    control: vllm_pb2_grpc.ControlStub = field(init=False)

    def __post_init__(self) -> None:
        stubs = {
            "generation": generation_pb2_grpc.GenerationServiceStub,
            "adapters": adapters_pb2_grpc.AdapterServiceStub,
            "server": server_pb2_grpc.ServerServiceStub,
            "health": health_pb2_grpc.HealthStub,
            "kserve": kserve_pb2_grpc.GRPCInferenceServiceStub,
            "inference": vllm_pb2_grpc.InferenceStub,
            "control": vllm_pb2_grpc.ControlStub,
        }
        for name, stub in stubs.items():
            object.__setattr__(self, name, stub(self.channel))


@dataclass(frozen=True, slots=True)
class Served:
    server: GrpcServer
    engine: FakeEngine
    client: Client
    port: int


@asynccontextmanager
async def served(
    *,
    started: bool = True,
    channel_options: tuple[tuple[str, int], ...] = (),
    credentials: grpc.ChannelCredentials | None = None,
    engine: Any = None,
    reloader: Reloader | None = None,
    **settings: object,
) -> AsyncIterator[Served]:
    """`started` False leaves the server where it is while a model loads. `engine`: instead of a fake one."""
    server = GrpcServer(ServerConfig(port=0, **settings), reloader)
    port = await server.start()
    engine = FakeEngine() if engine is None else engine
    if started:
        await server.open(engine)
    # Without a local pool, channels of one process share their connections, and tests would meet in them.
    options = (("grpc.use_local_subchannel_pool", 1), *channel_options)
    target = f"localhost:{port}" if credentials else f"127.0.0.1:{port}"
    channel = (
        grpc.aio.secure_channel(target, credentials, options=options)
        if credentials
        else grpc.aio.insecure_channel(target, options=options)
    )
    try:
        async with channel:
            yield Served(server, engine, Client(channel), port)
    finally:
        await server.stop()


@dataclass(frozen=True, slots=True)
class Failed:
    """How a call ended."""

    code: grpc.StatusCode
    message: str
    trailers: dict[str, str | bytes]
    details: dict[str, message.Message]  # by the name of their type

    @property
    def info(self) -> error_details_pb2.ErrorInfo:
        return self.details["ErrorInfo"]

    @property
    def fields(self) -> list[str]:
        """What BadRequest complains about."""
        return [violation.field for violation in self.details["BadRequest"].field_violations]


async def failure(call: Awaitable[object]) -> Failed:
    """The failure that a call must end with."""
    try:
        answer = await asyncio.wait_for(call, 10)
    except grpc.aio.AioRpcError as error:
        trailers = dict(error.trailing_metadata())
        return Failed(error.code(), error.details(), trailers, unpack(trailers))
    raise AssertionError(f"the call succeeded: {answer}")


def unpack(trailers: dict[str, str | bytes]) -> dict[str, message.Message]:
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    details: dict[str, message.Message] = {}
    for packed in status.details:
        kind = next(kind for kind in DETAIL_TYPES if packed.Is(kind.DESCRIPTOR))
        details[kind.DESCRIPTOR.name] = kind.FromString(packed.value)
    return details


async def read_all(call: grpc.aio.UnaryStreamCall, into: list[Any] | None = None) -> list[Any]:
    """The messages that are left. By `read`, as a test may have begun with it, and it does not mix with iteration."""
    messages = [] if into is None else into
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


def ask(request_id: str = "r1", **fields: object) -> generation_pb2.StreamGenerateRequest:
    """A valid streaming request."""
    return generation_pb2.StreamGenerateRequest(request_id=request_id, text="hello", **fields)


def ask_once(request_id: str = "r1", **fields: object) -> generation_pb2.GenerateRequest:
    """A valid unary request."""
    return generation_pb2.GenerateRequest(request_id=request_id, text="hello", **fields)
