"""One test, both clients: the synchronous one runs in a thread, because the server has the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from operator import attrgetter
from typing import Any

from gralora_server.client import AsyncClient, Client, GenerationStream, StreamDelta

# Without a local pool, channels of one process share their connections, and tests would meet in them.
OPTIONS = (("grpc.use_local_subchannel_pool", 1),)
AnyClient = Client | AsyncClient
Connect = Callable[..., Any]  # (port, **settings) -> asynchronous context manager of a client


@asynccontextmanager
async def connect_sync(port: int, host: str = "127.0.0.1", **settings: Any) -> AsyncIterator[Client]:
    with Client(f"{host}:{port}", options=OPTIONS, **settings) as client:
        yield client


@asynccontextmanager
async def connect_async(port: int, host: str = "127.0.0.1", **settings: Any) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"{host}:{port}", options=OPTIONS, **settings) as client:
        yield client


async def call(target: object, method: str, *args: Any, **kwargs: Any) -> Any:
    """`target.method(...)`, off the loop or awaited, whichever it is."""
    function = attrgetter(method)(target)
    if asyncio.iscoroutinefunction(function):
        return await function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


async def deltas(stream: Any) -> AsyncIterator[StreamDelta]:
    """What is left of either client's stream."""
    while (delta := await next_delta(stream)) is not None:
        yield delta


async def next_delta(stream: Any) -> StreamDelta | None:
    """None at the end."""
    if isinstance(stream, GenerationStream):
        return await asyncio.to_thread(next, stream, None)
    return await anext(stream, None)


async def close(stream: Any) -> None:
    await call(stream, "close" if isinstance(stream, GenerationStream) else "aclose")
