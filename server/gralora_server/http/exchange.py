"""One request and its response: a body that is bounded in size and time, and an answer at once or in events.

Knows nothing of what is asked. Raises `ClientLeftError` as soon as the client is seen to have left.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import pydantic

from gralora_runtime.errors import InvalidRequestError
from gralora_server.http.answering import Json
from gralora_server.http.errors import Headers, HttpError
from gralora_server.http.peer import NOBODY, Names
from gralora_server.json_values import Whole, misfit

BODY_S = 30.0  # for a body to arrive
FAREWELL_S = 2.0  # for an error to reach a client that reads

# In a scope.
ABORT = "gralora.abort"  # closes the connection at once
PEER = "gralora.peer"  # names in the client's certificate

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AnyBody = TypeVar("AnyBody", bound=Whole)
T = TypeVar("T")


def _leave_open() -> None:
    """The connection is somebody else's, as that of Ray Serve's proxy is."""


class ClientLeftError(Exception):
    """Nobody reads the response any more."""


class Exchange:
    """Used by one task at a time, but for `event`."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, max_body_bytes: int) -> None:
        self._receive = receive
        self._send = send
        self._max_body_bytes = max_body_bytes
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        self._abort: Callable[[], None] = scope.get(ABORT, _leave_open)
        self.peer: Names = scope.get(PEER, NOBODY)
        self.arrived_s = time.monotonic()
        self.begun = False  # the response has
        self._ended = False
        self.asked: Any = None  # the message that was made of the body, for the log line

    def header(self, name: str) -> str:
        """ "" if there is none."""
        return self._headers.get(name.encode(), b"").decode("latin-1").strip()

    def query(self) -> dict[str, str]:
        return self._query

    def remaining_s(self) -> float | None:
        """Until the client's deadline. Raises InvalidRequestError."""
        text = self.header("x-request-timeout")
        if not text:
            return None
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = math.nan
        if not 0 < timeout_s < math.inf:
            raise InvalidRequestError("X-Request-Timeout", text, "must be seconds, above 0")
        return timeout_s - (time.monotonic() - self.arrived_s)

    async def raw_body(self) -> bytes:
        """All of it. Raises `HttpError` when it is too long or too slow."""
        if int(self.header("content-length") or 0) > self._max_body_bytes:  # h11 and httptools have seen that it is one
            raise self._too_large()
        parts, num_bytes = [], 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeftError
                    parts.append(message.get("body", b""))
                    num_bytes += len(parts[-1])
                    if num_bytes > self._max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            problem = f"the body did not arrive within {BODY_S:g} s"
            raise HttpError(408, "BODY_TOO_SLOW", problem, [(b"connection", b"close")]) from None

    async def body(self, kind: type[AnyBody]) -> AnyBody:
        """The body as JSON of this kind. Raises `HttpError`, and InvalidRequestError naming the field."""
        raw = await self.raw_body()
        self.check_json()
        try:
            return kind.model_validate_json(raw).checked()
        except pydantic.ValidationError as error:
            raise misfit(error) from None

    def check_json(self) -> None:
        """That the client says so. Raises `HttpError`."""
        kind = self.header("content-type").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise HttpError(415, "CONTENT_TYPE", f"send application/json (got {kind[:80]!r})")

    async def while_connected(self, work: Awaitable[T]) -> T:
        """The result of `work`, in a task of its own, which is cancelled when the client leaves."""
        task = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(self._left())
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if task.cancelled():
            raise ClientLeftError
        return task.result()

    async def respond(self, status: int, body: Json, headers: Headers | None = None) -> None:
        """All at once."""
        await self.respond_with(_dumps(body), b"application/json", status=status, headers=headers)

    async def respond_with(
        self, content: bytes, kind: bytes, *, status: int = 200, headers: Headers | None = None
    ) -> None:
        """Content of any kind, all at once."""
        self.begun = True
        length = (b"content-length", b"%d" % len(content))
        await self._send(_start(status, [(b"content-type", kind), length, *(headers or [])]))
        await self._end(content)

    async def begin_events(self, headers: Headers) -> None:
        """Whatever comes next is an `event`, until `end_events`."""
        self.begun = True
        own = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        # Of nginx, which would keep events back.
        await self._send(_start(200, [*own, (b"x-accel-buffering", b"no"), *headers]))

    async def event(self, body: Json) -> None:
        """Waits while the client reads too slowly."""
        await self._send_event(_dumps(body))

    async def end_events(self) -> None:
        await self._end(b"data: [DONE]\n\n")

    async def farewell(self, status: int, body: Json, headers: Headers) -> None:
        """An error, wherever the response is. Whoever does not take it in time loses the connection."""
        try:
            async with asyncio.timeout(FAREWELL_S):
                if self.begun:
                    await self.event(body)
                    await self.end_events()
                else:
                    await self.respond(status, body, headers)
        except TimeoutError:
            self._abort()

    async def _send_event(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

    async def _end(self, content: bytes) -> None:
        self._ended = True
        await self._send({"type": "http.response.body", "body": content})

    async def _left(self) -> None:
        """Returns when the client has, before the response's end: the server tells of both in the same way."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self._ended:
            await asyncio.Event().wait()

    def _too_large(self) -> HttpError:
        return HttpError(413, "BODY_TOO_LARGE", f"the body must be at most {self._max_body_bytes} bytes")


def _start(status: int, headers: Headers) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def _dumps(body: Json) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
