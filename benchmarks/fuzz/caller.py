"""Sends bytes to a method of a server, whatever they are, and tells how the call ended."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

import grpc

from benchmarks.fuzz.mutants import Mutant
from benchmarks.fuzz.verdict import Ending
from gralora_server.client.errors import client_error

DEADLINE_S = 30.0  # of each call: what is asked here takes milliseconds, and a queue of all callers a second or two
GRACE_S = 5.0  # after its deadline, by which gRPC itself ends a call

OK = Ending(code=grpc.StatusCode.OK)


class Caller:
    """Made on the event loop that uses it."""

    def __init__(self, address: str, deadline_s: float = DEADLINE_S) -> None:
        # The stubs want serializers; without one bytes are sent as they are.
        self._channel: Any = grpc.aio.insecure_channel(address)
        # Of a stream of requests that the server ends while we write, grpc.aio may forget why (grpc/grpc#36066).
        self._blocking: Any = grpc.insecure_channel(address)
        self._deadline_s = deadline_s

    async def send(self, mutant: Mutant) -> Ending:
        try:
            async with asyncio.timeout(self._deadline_s + GRACE_S):
                return await self._send(mutant)
        except TimeoutError:
            return Ending(code=None)
        except grpc.RpcError as error:
            problem = client_error(error)
            return Ending(code=problem.code, reason=problem.reason, message=problem.message)

    async def _send(self, mutant: Mutant) -> Ending:
        method, path = mutant.method, mutant.method.path
        if method.sends_many and method.answers_many:
            call = self._blocking.stream_stream(path)(iter(mutant.parts), timeout=self._deadline_s)
            return await asyncio.to_thread(_worst, call, mutant)
        if method.sends_many:
            await _result(self._blocking.stream_unary(path).future(iter(mutant.parts), timeout=self._deadline_s))
        elif method.answers_many:
            call = self._channel.unary_stream(path)(mutant.parts[0], timeout=self._deadline_s)
            await _read(call, mutant)
        else:
            await self._channel.unary_unary(path)(mutant.parts[0], timeout=self._deadline_s)
        return OK

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._blocking.close()
        await self._channel.close(grace=None)


async def _read(call: Any, mutant: Mutant) -> None:
    """To its end; of a stream that has none, until it has told all that there is to tell."""
    try:
        while (raw := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            if getattr(mutant.method.response.FromString(raw), "synced", False):
                return
    finally:
        call.cancel()


def _worst(call: Any, mutant: Mutant) -> Ending:
    """Of a call that goes on after errors, which its messages tell: what became of its requests."""
    ending = OK
    for raw in call:
        reason, _, message = getattr(mutant.method.response.FromString(raw), "error_message", "").partition(": ")
        if reason and ending.code is grpc.StatusCode.OK:
            code = grpc.StatusCode.INTERNAL if reason == "INTERNAL" else grpc.StatusCode.OK
            ending = Ending(code=code, reason=reason, message=message)
    return ending


async def _result(call: Any) -> None:
    """Of a call that gRPC's threads carry out; it is cancelled if the wait is."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    call.add_done_callback(lambda _: None if loop.is_closed() else loop.call_soon_threadsafe(done.set))
    try:
        await done.wait()
    finally:
        call.cancel()
    call.result()
