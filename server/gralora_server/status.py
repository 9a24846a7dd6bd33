"""What a client is told of an error, as a gRPC status: the google.rpc details that go with it, and its trailers.

Knows nothing of requests or streams.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, message
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from gralora_runtime.errors import AdapterError, InvalidRequestError, QuotaExceededError
from gralora_server.explanation import MAX_VALUE_BYTES, Explanation, clip, explain

DOMAIN = "gralora.dev"
DETAILS_TRAILER = "grpc-status-details-bin"
PUSHBACK_TRAILER = "grpc-retry-pushback-ms"

Trailers = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """All that a gRPC call needs to end with an error."""

    code: grpc.StatusCode
    message: str
    trailers: Trailers


def failure_of(error: BaseException) -> Failure:
    """The status for an error."""
    told = explain(error)
    status = status_pb2.Status(code=told.code.value[0], message=told.message)
    for detail in _details(told, error):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return Failure(told.code, told.message, ((DETAILS_TRAILER, status.SerializeToString()), *_pushback(told)))


def _details(told: Explanation, error: BaseException) -> list[message.Message]:
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=told.reason, domain=DOMAIN, metadata=told.metadata)
    ]
    if isinstance(error, InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=clip(error.problem, MAX_VALUE_BYTES)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, AdapterError):
        name = clip(error.name, MAX_VALUE_BYTES)
        details.append(error_details_pb2.ResourceInfo(resource_type="gralora.v1.Adapter", resource_name=name))
    if isinstance(error, QuotaExceededError):
        exceeded = error_details_pb2.QuotaFailure.Violation(
            subject=f"tenant:{error.tenant}", description=clip(f"{error.limit} = {error.value:.15g}", MAX_VALUE_BYTES)
        )
        details.append(error_details_pb2.QuotaFailure(violations=[exceeded]))
    if told.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(math.ceil(told.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details


def _pushback(told: Explanation) -> Trailers:
    """What gRPC's own retry policy obeys, where RetryInfo is for applications."""
    if told.retry_after_s is None:
        return ()
    return ((PUSHBACK_TRAILER, str(math.ceil(told.retry_after_s * 1000))),)
