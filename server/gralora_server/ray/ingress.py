"""Our services in Serve's gRPC proxies: what a replica has to know of a call goes in, and what it said comes out.

`add_services` and `add_kserve` are what `grpc_servicer_functions` names. Serve replaces the handlers that they add by
its own, which send a call to a replica; around those stands what is here. Loads no model and no Ray.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from gralora.v1 import adapters_pb2_grpc, generation_pb2_grpc, server_pb2_grpc
from gralora_server.errors import ReplicaLostError
from gralora_server.ray.affinity import MODEL_KEY, wanted
from gralora_server.ray.context import REMAINING_KEY
from gralora_server.status import DETAILS_TRAILER, failure_of

INTERNAL = {grpc.StatusCode.INTERNAL, grpc.StatusCode.INTERNAL.value[0]}  # gRPC tells a number, whatever it was told

_log = logging.getLogger(__name__)

Make = Callable[..., Callable[[Any, Any], Any]]


def add_services(servicer: Any, server: Any) -> None:
    """Generation, adapters, the server itself, and health."""
    for add in (
        generation_pb2_grpc.add_GenerationServiceServicer_to_server,
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server,
        server_pb2_grpc.add_ServerServiceServicer_to_server,
        health_pb2_grpc.add_HealthServicer_to_server,
    ):
        _add(add, servicer, server)


def add_kserve(servicer: Any, server: Any) -> None:
    """What KServe's and Triton's clients ask, for replicas that serve them."""
    from gralora.foreign import kserve_pb2_grpc  # a process can have only one file of that name

    _add(kserve_pb2_grpc.add_GRPCInferenceServiceServicer_to_server, servicer, server)


def _add(add: Callable[[Any, Any], None], servicer: Any, server: Any) -> None:
    serves = server.service_handler_factory
    server.service_handler_factory = standing_around(serves)
    try:
        add(servicer, server)
    finally:
        server.service_handler_factory = serves


def standing_around(serves: Make) -> Make:
    """A factory of handlers like Serve's, which calls those of Serve."""

    def make(**method: Any) -> Callable[[Any, Any], Any]:
        behavior = serves(**method)

        async def answer(request: Any, context: Any) -> Any:
            response = await behavior(request, HintedContext(context, request))
            _own_up(context)
            return response

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            async for message in behavior(request, HintedContext(context, request)):
                if message or not context.code():  # a call that fails ends with an empty message: see `context.py`
                    yield message
            _own_up(context)

        return stream if inspect.isasyncgenfunction(behavior) else answer

    return make


class HintedContext:
    """A call's context as Serve gets it: its metadata has the client's deadline, and which adapter is wanted."""

    def __init__(self, context: Any, request: Any) -> None:
        self._context = context
        metadata = [one for one in context.invocation_metadata() if one[0] != REMAINING_KEY]
        remaining_s = context.time_remaining()
        if remaining_s is not None:
            metadata.append((REMAINING_KEY, f"{remaining_s:.3f}"))
        adapter = wanted(request)
        if adapter and not any(key == MODEL_KEY for key, _ in metadata):
            metadata.append((MODEL_KEY, adapter))
        self._metadata = tuple(metadata)

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _own_up(context: Any) -> None:
    """What ends as INTERNAL without details was said by no replica of ours: it is gone, or was not reached."""
    trailers = tuple(context.trailing_metadata())
    if context.code() not in INTERNAL or any(key == DETAILS_TRAILER for key, _ in trailers):
        return
    _log.warning("no replica ended this call: %s", context.details())
    failure = failure_of(ReplicaLostError())
    context.set_code(failure.code)
    context.set_details(failure.message)
    context.set_trailing_metadata((*trailers, *failure.trailers))
