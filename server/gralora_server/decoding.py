"""Bytes become messages in our hands, and not in gRPC's, which come first and log a traceback for bytes that are none.

Knows neither tokens nor logs: it is told how to refuse a call.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

import grpc

from gralora_runtime.errors import InvalidRequestError

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in the stubs alone
Behavior = Callable[[Any, Context], Any]  # a coroutine function, or an asynchronous generator
Refuse = Callable[[Context, InvalidRequestError], Awaitable[NoReturn]]


def behavior_of(handler: Handler) -> Behavior:
    """What serves a method: the one of the four that is set."""
    untyped: Any = handler  # the stubs know synchronous servicers only
    behavior: Behavior = untyped.unary_unary or untyped.unary_stream or untyped.stream_unary or untyped.stream_stream
    return behavior


def with_behavior(handler: Handler, behavior: Behavior) -> Handler:
    """The same method, served by `behavior`, which gets the bytes of its request as they came."""
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    made: Handler = make(behavior, None, handler.response_serializer)
    return made


def decoding(handler: Handler, behavior: Behavior, refuse: Refuse) -> Behavior:
    """The same for bytes: `behavior` gets what `handler` makes of them; a stream of requests only as an iterator."""

    async def message(raw: bytes, context: Context) -> Any:
        try:
            return handler.request_deserializer(raw) if handler.request_deserializer else raw
        except Exception:  # whatever it is, the bytes are to blame
            error = InvalidRequestError("request", f"{len(raw)} bytes", "must be this method's protobuf message")
        return await refuse(context, error)

    async def messages(raws: AsyncIterable[bytes], context: Context) -> AsyncIterator[Any]:
        async for raw in raws:
            yield await message(raw, context)

    async def request(raw: Any, context: Context) -> Any:
        return messages(raw, context) if handler.request_streaming else await message(raw, context)

    return preceded(behavior, request)


def preceded(behavior: Behavior, prepare: Behavior) -> Behavior:
    """`behavior` gets what `prepare`, a coroutine function, makes of the request, unless that ends the call.

    gRPC tells a coroutine function from an asynchronous generator, so each stays what it is.
    """

    async def answer(request: Any, context: Context) -> Any:
        return await behavior(await prepare(request, context), context)

    async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
        async for response in behavior(await prepare(request, context), context):
            yield response

    return generate if inspect.isasyncgenfunction(behavior) else answer
