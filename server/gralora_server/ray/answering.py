"""A call's way through a replica: from Serve's message and context to our handlers, and back. Knows no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from gralora_server.interceptors import AuthInterceptor, CallInterceptor
from gralora_server.parts import Parts
from gralora_server.ray.context import ReplicaContext, ServeContext
from gralora_server.ray.handlers import Handlers


class Answering:
    """All calls of one replica."""

    def __init__(self, parts: Parts, replica: str) -> None:
        self._replica = replica
        self._handlers = Handlers([AuthInterceptor(parts.tenancy), CallInterceptor()])
        parts.add_to(self._handlers)

    async def answer(self, path: str, request: Any, serve: ServeContext) -> Any:
        """The one message of the answer; an empty one if the call failed."""
        return await self._run(path, request, ReplicaContext(serve, self._replica))

    async def messages(self, path: str, request: Any, serve: ServeContext) -> AsyncGenerator[Any, None]:
        """The messages of the answer, and behind them an empty one if the call failed."""
        context = ReplicaContext(serve, self._replica)
        running = asyncio.create_task(self._run(path, request, context))
        running.add_done_callback(lambda _: context.end())
        try:
            async for message in context.written():
                yield message
            failed = await running
            if failed is not None:
                yield failed
        finally:  # whoever leaves in between ends the call
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    async def _run(self, path: str, request: Any, context: ReplicaContext) -> Any:
        """What the handler returns: of a stream nothing."""
        try:
            behavior = await self._handlers.behavior(path, context.invocation_metadata())
            return await behavior(request, context)  # type: ignore[arg-type]  # it has what is used of a context
        except grpc.aio.AbortError:
            return Empty()
