"""What a servicer is told of its call and tells of it, on top of the little that Serve hands to a replica.

Serve carries the code, the message and the trailers of a call only together with a message of its stream. So a call
that fails is not raised to Serve: it ends with an empty message, which `ingress` takes out again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import grpc

# Written by `ingress`, which knows the client's deadline.
REMAINING_KEY = "gralora-remaining-s"
REPLICA_KEY = "gralora-replica"


class ServeContext(Protocol):
    """Of `ray.serve.grpc_util.RayServegRPCContext`, what is used here."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]: ...
    def set_code(self, code: grpc.StatusCode) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str | bytes]]) -> None: ...


class ReplicaContext:
    """Of one call: what our servicers and interceptors use of `grpc.aio.ServicerContext`."""

    def __init__(self, serve: ServeContext, replica: str = "", now_s: Callable[[], float] = time.monotonic) -> None:
        """`replica`: its name, which a client reads in the trailers."""
        self._serve = serve
        self._trailers: list[tuple[str, str | bytes]] = [(REPLICA_KEY, replica)]
        self._now_s = now_s
        self._ends_s = _ends_s(serve.invocation_metadata(), now_s())
        # Without a limit, as Serve takes every message at once and keeps it until the client reads.
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        serve.set_trailing_metadata(self._trailers)

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        return self._serve.invocation_metadata()

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """Who the peer is: Serve's proxy, which has shown nothing."""
        return {}

    def time_remaining(self) -> float | None:
        return None if self._ends_s is None else max(self._ends_s - self._now_s(), 0.0)

    async def send_initial_metadata(self, _metadata: object) -> None:
        """Serve sends its own, with the first message."""

    async def write(self, message: Any) -> None:
        self._messages.put_nowait(message)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Iterable[tuple[str, str | bytes]] = ()
    ) -> NoReturn:
        self._serve.set_code(code)
        self._serve.set_details(details)
        self._serve.set_trailing_metadata([*self._trailers, *trailing_metadata])
        raise grpc.aio.AbortError(details)

    def end(self) -> None:
        """Nothing more will be written."""
        self._messages.put_nowait(None)

    async def written(self) -> AsyncIterator[Any]:
        """The messages, until the end."""
        while (message := await self._messages.get()) is not None:
            yield message


def _ends_s(metadata: Sequence[tuple[str, str | bytes]], now_s: float) -> float | None:
    given = next((value for key, value in metadata if key == REMAINING_KEY), None)
    return None if given is None else now_s + float(given)
