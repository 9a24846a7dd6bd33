"""Many requests on one stream, side by side, and the one stream of answers that they share. Knows no messages.

Whoever sends more than is served at once is not read meanwhile, so that HTTP/2 holds it up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Generic, TypeVar

import grpc

from gralora_server.sending import send

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]
Serve = Callable[[T], Coroutine[Any, Any, None]]


class Line(Generic[T]):
    """The answers' stream: gRPC takes one message at a time, so those who write do so in turns."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._turn = asyncio.Lock()

    async def write(self, message: T) -> None:
        """Raises CancelledError when there is nobody to write to."""
        async with self._turn:
            await send(self._context, message)


async def serve_each(requests: AsyncIterator[T], serve: Serve[T], *, at_once: int, until: asyncio.Event) -> bool:
    """Whether the client has sent all and each was served; or else `until` was set, and those that were read were.

    Raises what `serve` raises first. None of them runs any more afterwards, however this ends.
    """
    ending = asyncio.create_task(until.wait())
    reading: asyncio.Task[T | None] | None = None
    running: set[asyncio.Task[None]] = set()
    has_all = False
    try:
        while not (has_all or ending.done()):
            if reading is None and len(running) < at_once:
                reading = asyncio.create_task(_next(requests))
            awaited: set[asyncio.Task[Any]] = {ending, *running, *([reading] if reading is not None else [])}
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            _drop_served(running)
            if reading is not None and reading.done():
                request, reading = reading.result(), None
                has_all = request is None
                if request is not None:
                    running.add(asyncio.create_task(serve(request)))
        while running:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            _drop_served(running)
        return has_all
    finally:
        await _end({ending, *running, *([reading] if reading is not None else [])})


async def _next(requests: AsyncIterator[T]) -> T | None:
    """None: the client has sent all."""
    return await anext(requests, None)


def _drop_served(running: set[asyncio.Task[None]]) -> None:
    """Raises what one of them raised. Of one that was cancelled the client has left, as gRPC will say in a moment."""
    served = {task for task in running if task.done()}
    running -= served
    for error in [task.exception() for task in served if not task.cancelled()]:
        if error is not None:
            raise error


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
