"""What every call passes through: authorization first, then one log line and the turning of errors into statuses.

Our handlers are coroutines, the streaming ones too (they write to the context), so one wrapper fits both and sees the
end of a stream where it really is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

import grpc

from gralora_runtime.errors import GraloraError
from gralora_server.auth import Tokens
from gralora_server.status import Failure, clip, failure_of

OUR_METHODS = "/gralora.v1."
HEALTH_METHODS = "/grpc.health.v1.Health/"  # probes carry no token

Context = grpc.aio.ServicerContext[Any, Any]
Behavior = Callable[[Any, Context], Awaitable[Any]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in the stubs alone
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any]"]]

_calls = logging.getLogger("gralora_server.calls")


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Refuses calls whose bearer token does not allow them."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(self, continuation: Continuation, call: grpc.HandlerCallDetails) -> Handler:
        handler = await continuation(call)
        if handler is None or call.method.startswith(HEALTH_METHODS):
            return handler
        try:
            self._tokens.authorize(call.method, _authorization(call))
        except GraloraError as error:
            return _with_behavior(handler, _refusal(call.method, error))
        return handler


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Gives each of our calls its log line, and its status when it fails."""

    async def intercept_service(self, continuation: Continuation, call: grpc.HandlerCallDetails) -> Handler:
        handler = await continuation(call)
        if handler is None or not call.method.startswith(OUR_METHODS):
            return handler
        behavior: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        return _with_behavior(handler, _observed(call.method, behavior))


def _observed(method: str, behavior: Behavior) -> Behavior:
    async def observed(request: Any, context: Context) -> Any:
        started_s = time.monotonic()
        code = grpc.StatusCode.OK
        try:
            return await behavior(request, context)
        except asyncio.CancelledError:
            code = _cancellation(context)
            raise
        except Exception as error:
            failure = failure_of(error)
            code = failure.code
        finally:
            _log_call(method, request, code, time.monotonic() - started_s)
        # May wait for a client that does not read, and so comes last: nothing is held any more.
        return await _end(context, failure)

    return observed


def _refusal(method: str, error: GraloraError) -> Behavior:
    async def refuse(request: Any, context: Context) -> None:
        failure = failure_of(error)
        _log_call(method, request, failure.code, 0.0)
        await _end(context, failure)

    return refuse


async def _end(context: Context, failure: Failure) -> NoReturn:
    await context.abort(failure.code, failure.message, failure.trailers)


def _cancellation(context: Context) -> grpc.StatusCode:
    """A deadline that passes and a client that leaves arrive alike."""
    remaining_s = context.time_remaining()
    if remaining_s is not None and remaining_s <= 0:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED


def _log_call(method: str, request: Any, code: grpc.StatusCode, duration_s: float) -> None:
    """As JSON, because the request's strings are whatever a client sent."""
    adapter = getattr(request, "adapter", "") or getattr(request, "name", "")
    fields = {
        "method": method,
        "request_id": clip(getattr(request, "request_id", ""), 128),
        "adapter": clip(adapter, 128),
        "code": code.name,
        "duration_ms": round(duration_s * 1000, 1),
    }
    _calls.info("%s", json.dumps(fields))


def _authorization(call: grpc.HandlerCallDetails) -> str:
    for key, value in call.invocation_metadata:
        if key == "authorization" and isinstance(value, str):
            return value
    return ""


def _with_behavior(handler: Handler, behavior: Behavior) -> Handler:
    """The same method, served by `behavior`."""
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    made: Handler = make(behavior, handler.request_deserializer, handler.response_serializer)
    return made
