"""What every call passes through: authorization, decoding, then one log line and the turning of errors into statuses.

Our handlers are coroutines, the streaming ones too (they write to the context), so one wrapper fits both and sees the
end of a stream where it really is. What a caller without a token and without a valid message can cause, in any number,
is a status each, and a log line now and then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc

from gralora_runtime.errors import GraloraError, InvalidRequestError
from gralora_runtime.failure import contained
from gralora_server.call_log import Clock, SparseLog, begin_call, call_fields, log_call
from gralora_server.decoding import Behavior, Context, Handler, behavior_of, decoding, preceded, with_behavior
from gralora_server.status import Failure, failure_of
from gralora_server.tenants.caller import Recognise, set_current
from gralora_server.tenants.roles import OURS, check_call
from gralora_server.tenants.tenancy import Tenancy
from gralora_server.tracing.parent import HEADER, set_parent

HEALTH_METHODS = "/grpc.health.v1.Health/"  # probes carry no token

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any]"]]


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Finds out who calls, and refuses who may not: with its request unread if a token says so, else undecoded.

    gRPC serves a call in one task, its interceptors too, so what is set here is set for its handler.
    """

    def __init__(self, tenancy: Tenancy, clock: Clock = time.monotonic) -> None:
        self._tenancy = tenancy
        self._log = SparseLog(clock)

    async def intercept_service(self, continuation: Continuation, call: grpc.HandlerCallDetails) -> Handler:
        handler = await continuation(call)
        if handler is None or call.method.startswith(HEALTH_METHODS):
            return handler
        identities, authorization = self._tenancy.current.identities, _said(call, "authorization")
        if identities.reads_certificates and not authorization:
            return with_behavior(handler, preceded(behavior_of(handler), self._by_certificate(call.method)))
        try:
            _enter(lambda: self._tenancy.current.identities.by_authorization(authorization), call.method)
        except GraloraError as error:
            # Whatever the method is: of a stream of requests gRPC reads nothing by itself.
            return grpc.stream_stream_rpc_method_handler(self._refusal(call.method, error))
        return handler

    def _by_certificate(self, method: str) -> Behavior:
        """Only a handler is told who the peer is."""

        async def check(request: object, context: Context) -> object:
            try:
                peer = context.auth_context()
                _enter(lambda: self._tenancy.current.identities.by_certificate(peer), method)
            except GraloraError as error:
                await self._refuse(method, error, context)
            return request

        return check

    def _refusal(self, method: str, error: GraloraError) -> Behavior:
        async def refuse(_unread: object, context: Context) -> None:
            await self._refuse(method, error, context)

        return refuse

    async def _refuse(self, method: str, error: GraloraError, context: Context) -> NoReturn:
        failure = failure_of(error)
        self._log.write(call_fields(method, None, failure.code, 0.0))
        await _end(context, failure)


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Decodes the request of every call, and gives each of our calls its log line, and its status when it fails."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._log = SparseLog(clock)

    async def intercept_service(self, continuation: Continuation, call: grpc.HandlerCallDetails) -> Handler:
        handler = await continuation(call)
        if not handler:
            return handler  # there is no such method
        behavior = behavior_of(handler)
        if call.method.startswith(OURS):
            set_parent(_said(call, HEADER))
            behavior = _observed(call.method, behavior)
        return with_behavior(handler, decoding(handler, behavior, self._refusal(call.method)))

    def _refusal(self, method: str) -> Callable[[Context, InvalidRequestError], Awaitable[NoReturn]]:
        async def refuse(context: Context, error: InvalidRequestError) -> NoReturn:
            failure = failure_of(error)
            self._log.write(call_fields(method, None, failure.code, 0.0) | {"problem": str(error)})
            await _end(context, failure)

        return refuse


def _enter(recognise: Recognise, method: str) -> None:
    """From here on the call is its caller's, for its log line even if it may go no further."""
    caller = recognise()
    set_current(caller, recognise)
    check_call(caller.role, method)


def _observed(method: str, behavior: Behavior) -> Behavior:
    async def observed(request: Any, context: Context) -> Any:
        started_s = time.monotonic()
        begin_call()
        code: grpc.StatusCode | None = grpc.StatusCode.OK
        try:
            return await behavior(request, context)
        except asyncio.CancelledError:
            code = _cancellation(context)
            raise
        except grpc.aio.AbortError:  # a message of its stream was none: `decoding` has refused it, and it is logged
            code = None
            raise
        except BaseException as error:  # a panic of a Rust library is no `Exception`
            if not contained(error):
                raise
            failure = failure_of(error)
            code = failure.code
        finally:
            if code is not None:
                log_call(call_fields(method, request, code, time.monotonic() - started_s))
        # May wait for a client that does not read, and so comes last: nothing is held any more.
        return await _end(context, failure)

    return observed


async def _end(context: Context, failure: Failure) -> NoReturn:
    await context.abort(failure.code, failure.message, failure.trailers)


def _cancellation(context: Context) -> grpc.StatusCode:
    """A deadline that passes and a client that leaves arrive alike."""
    remaining_s = context.time_remaining()
    if remaining_s is not None and remaining_s <= 0:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED


def _said(call: grpc.HandlerCallDetails, name: str) -> str:
    """ "" if its metadata has no such thing."""
    for key, value in call.invocation_metadata:
        if key == name and isinstance(value, str):
            return value
    return ""
