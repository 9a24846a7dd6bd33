"""The handlers that a server of gRPC would have, behind the same interceptors, for who has messages and no port."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import grpc

from gralora_server.decoding import Behavior, Handler, behavior_of, with_behavior

Metadata = Sequence[tuple[str, str | bytes]]


class Handlers:
    """Has the methods of a server of gRPC that `add_..._to_server` calls."""

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]]) -> None:
        self._interceptors = interceptors
        self._handlers: dict[str, Handler] = {}

    def add_generic_rpc_handlers(self, handlers: Iterable[object]) -> None:
        """They are the registered ones once more."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        # Serve's proxy has decoded the requests, so here nobody need.
        for name, handler in handlers.items():
            self._handlers[f"/{service}/{name}"] = with_behavior(handler, behavior_of(handler))

    async def behavior(self, path: str, metadata: Metadata) -> Behavior:
        """What serves a call of this method: everything that interceptors have to say of it is said in there."""

        async def innermost(call: grpc.HandlerCallDetails) -> Handler:
            return self._handlers[call.method]

        continuation: Any = innermost
        for interceptor in reversed(self._interceptors):
            continuation = partial(interceptor.intercept_service, continuation)
        return behavior_of(await continuation(_Call(path, metadata)))


class _Call(grpc.HandlerCallDetails):
    def __init__(self, method: str, metadata: Metadata) -> None:
        self.method = method
        self.invocation_metadata: Any = tuple(metadata)  # what the stubs ask for is gRPC's own class
