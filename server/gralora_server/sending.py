"""Messages to a stream whose client may leave at any time."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc


async def send(context: grpc.aio.ServicerContext[Any, Any], message: Any) -> None:
    """Raises CancelledError when there is nobody to write to."""
    try:
        await context.write(message)
    except grpc.aio.InternalError as cause:  # the client left while a write was pending, before gRPC noticed
        raise asyncio.CancelledError from cause
