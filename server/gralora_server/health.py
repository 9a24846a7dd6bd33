"""The standard health service, `grpc.health.v1`, answering for the server ("") and each of its services alike.

Not the ready-made asyncio servicer of grpcio-health-checking: there, the first of several watchers to leave takes the
others' notifications with it, so they would never hear of a drain. Adapters are no health matter; they have their API.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gralora_runtime.errors import DrainingError

Context = grpc.aio.ServicerContext[Any, Any]
Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package is untyped
    """NOT_SERVING until told otherwise."""

    def __init__(self, services: Collection[str]) -> None:
        self._names = frozenset({"", *services})
        self._serving = False
        self._closed = False
        self._changed = asyncio.Condition()

    async def set_serving(self, serving: bool) -> None:
        async with self._changed:
            self._serving = serving
            self._changed.notify_all()

    async def close(self) -> None:
        """End all watches, which would otherwise hold up the server's stop."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return Response(status=self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        sent = None
        while not self._closed or sent != self._status(request.service):
            sent = self._status(request.service)
            await context.write(Response(status=sent))
            async with self._changed:
                while not self._closed and self._status(request.service) == sent:
                    await self._changed.wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(DrainingError()))

    def _status(self, service: str) -> int:
        if service not in self._names:
            return int(Response.SERVICE_UNKNOWN)
        return int(Response.SERVING if self._serving else Response.NOT_SERVING)
