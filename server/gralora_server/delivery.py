"""One request's deltas on their way to its client: merged into messages, written in bounded time.

Knows neither the engine nor how a call ends: errors leave as exceptions, and whoever opened the stream closes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from gralora.v1 import generation_pb2
from gralora_runtime.request import Delta
from gralora_runtime.stream import merge_deltas
from gralora_server.convert import to_stream_response
from gralora_server.errors import StalledClientError

Write = Callable[[generation_pb2.StreamGenerateResponse], Awaitable[None]]


async def merged(deltas: AsyncIterator[Delta], *, min_tokens: int) -> AsyncIterator[Delta]:
    """Join deltas until they hold `min_tokens` tokens. The first and the last never wait."""
    pending: list[Delta] = []
    num_tokens = 0
    async for delta in deltas:
        pending.append(delta)
        num_tokens += len(delta.token_ids)
        if num_tokens >= min_tokens or delta.started is not None or delta.finished is not None:
            yield merge_deltas(pending)
            pending, num_tokens = [], 0


async def deliver(
    deltas: AsyncIterator[Delta], write: Write, *, request_id: str, min_tokens: int, write_timeout_s: float
) -> None:
    """Write the whole generation. Raises `StalledClientError` when a write is not taken in time."""
    announced = request_id  # on the first message only
    async for delta in merged(deltas, min_tokens=min_tokens):
        message = to_stream_response(delta, request_id=announced)
        announced = ""
        try:
            async with asyncio.timeout(write_timeout_s):
                await write(message)
        except TimeoutError as cause:
            raise StalledClientError(request_id, write_timeout_s) from cause


async def collect(deltas: AsyncIterator[Delta]) -> Delta:
    """The whole generation at once."""
    return merge_deltas([delta async for delta in deltas])
