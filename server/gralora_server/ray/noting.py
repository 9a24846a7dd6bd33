"""HTTP beside Serve's hint: a model that a client names to Serve is noted once a request with it has been answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from gralora_server.http.exchange import ABORT, Receive, Scope, Send

MODEL_HEADER = b"serve_multiplexed_model_id"  # Serve's
OK = 200

Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class NotingCalls:
    """An application of ASGI around another."""

    def __init__(self, calls: Application, note: Callable[[str], Awaitable[Any]]) -> None:
        self._calls = calls
        self._note = note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[ABORT] = _keep_open
        model = next((value.decode("latin-1") for key, value in scope.get("headers", ()) if key == MODEL_HEADER), "")

        async def noting(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and message["status"] == OK:
                await self._note(model)
            await send(message)

        await self._calls(scope, receive, noting if model else send)


def _keep_open() -> None:
    """Nobody waits here for a client that does not read: Serve takes every message at once."""
