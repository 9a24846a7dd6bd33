"""Which gRPC status each error becomes: one table, and the google.rpc details that go with it.

Knows nothing of requests or streams. Everything that it puts into trailers is bounded, because a client refuses the
whole answer when its metadata exceeds 8 KiB.
"""

from __future__ import annotations

import logging
import math
import uuid
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, message
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from gralora_runtime.errors import (
    AdapterBusyError,
    AdapterCapacityError,
    AdapterConversionError,
    AdapterError,
    AdapterNotFoundError,
    AdapterQuarantinedError,
    AdapterRejectedError,
    AdapterSourceError,
    AdapterUploadError,
    AdapterUploadQuotaError,
    AdapterVersionLostError,
    CatalogueError,
    DeadlineExceededError,
    DescriptorShortageError,
    DrainingError,
    GraloraError,
    InvalidRequestError,
    MemoryShortageError,
    NumericalError,
    QueueFullError,
    QuotaExceededError,
    RequestCancelledError,
    RequestFailedError,
    SlowConsumerError,
    StepFailedError,
    TooLateError,
)
from gralora_runtime.shortage import out_of_memory
from gralora_server.errors import (
    ConfigInvalidError,
    EngineStuckError,
    PermissionDeniedError,
    RestartingError,
    StartingError,
    UnauthenticatedError,
)

DOMAIN = "gralora.dev"
DETAILS_TRAILER = "grpc-status-details-bin"
PUSHBACK_TRAILER = "grpc-retry-pushback-ms"
# Bytes. The message travels twice (percent-encoded, up to 3x, and in the details) and the details as base64 (4/3x);
# four metadata values and two copies elsewhere in the details stay below 8 KiB together.
MAX_MESSAGE_BYTES = 800
MAX_VALUE_BYTES = 300

CODES: dict[type[GraloraError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    AdapterNotFoundError: grpc.StatusCode.NOT_FOUND,
    AdapterRejectedError: grpc.StatusCode.FAILED_PRECONDITION,
    # As the answers that led to it, but with a time.
    AdapterQuarantinedError: grpc.StatusCode.FAILED_PRECONDITION,
    AdapterVersionLostError: grpc.StatusCode.FAILED_PRECONDITION,
    AdapterConversionError: grpc.StatusCode.FAILED_PRECONDITION,
    AdapterBusyError: grpc.StatusCode.FAILED_PRECONDITION,
    # Not RESOURCE_EXHAUSTED: trying again does not help until an operator unpins, unloads or enlarges the pool.
    AdapterCapacityError: grpc.StatusCode.FAILED_PRECONDITION,
    AdapterUploadError: grpc.StatusCode.FAILED_PRECONDITION,
    AdapterUploadQuotaError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    # Not NOT_FOUND: nobody could say whether there is such an adapter, and soon somebody may.
    AdapterSourceError: grpc.StatusCode.UNAVAILABLE,
    # The same: a full disk, or one taken away, is an operator's to mend. What was asked has not happened.
    CatalogueError: grpc.StatusCode.FAILED_PRECONDITION,
    # A reload that changed nothing.
    ConfigInvalidError: grpc.StatusCode.FAILED_PRECONDITION,
    # The adapter's weights or the prompt are at fault, not us, and the same again ends the same.
    NumericalError: grpc.StatusCode.FAILED_PRECONDITION,
    MemoryShortageError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DescriptorShortageError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    # Not DEADLINE_EXCEEDED, which says that time has passed: the same request, a little later, may be served at once.
    TooLateError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    QuotaExceededError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SlowConsumerError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    RequestCancelledError: grpc.StatusCode.CANCELLED,
    # Clients and proxies try again on this one: whatever it was, it need not have been this request.
    StepFailedError: grpc.StatusCode.UNAVAILABLE,
    StartingError: grpc.StatusCode.UNAVAILABLE,
    RestartingError: grpc.StatusCode.UNAVAILABLE,
    EngineStuckError: grpc.StatusCode.UNAVAILABLE,
    DrainingError: grpc.StatusCode.UNAVAILABLE,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
}

Trailers = tuple[tuple[str, str | bytes], ...]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """All that a gRPC call needs to end with an error."""

    code: grpc.StatusCode
    message: str
    trailers: Trailers


def failure_of(error: BaseException) -> Failure:
    """The status for an error. What is not in the table is our bug: logged with its traceback, and hidden."""
    if isinstance(error, RequestFailedError):  # a bug as well, which the engine has logged
        return _internal(error.error_id)
    code = next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), None)
    if isinstance(error, GraloraError) and code is not None:
        return _build(code, str(error), _details(error), _pushback(error))
    if out_of_memory(error):
        return failure_of(MemoryShortageError("the call was answered"))
    error_id = uuid.uuid4().hex
    _log.error("internal error %s", error_id, exc_info=error)
    return _internal(error_id)


def _internal(error_id: str) -> Failure:
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"error_id": error_id})
    return _build(grpc.StatusCode.INTERNAL, f"internal error {error_id}; the server's log has the cause", [info], ())


def _details(error: GraloraError) -> list[message.Message]:
    metadata = {key: clip(value, MAX_VALUE_BYTES) for key, value in error.metadata().items()}
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
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
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(math.ceil(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details


def _pushback(error: GraloraError) -> Trailers:
    """What gRPC's own retry policy obeys, where RetryInfo is for applications."""
    if error.retry_after_s is None:
        return ()
    return ((PUSHBACK_TRAILER, str(math.ceil(error.retry_after_s * 1000))),)


def _build(code: grpc.StatusCode, text: str, details: list[message.Message], extra: Trailers) -> Failure:
    text = clip(text, MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=code.value[0], message=text)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return Failure(code, text, ((DETAILS_TRAILER, status.SerializeToString()), *extra))


def clip(text: str, num_bytes: int) -> str:
    """At most `num_bytes` of UTF-8, and no half character; says so when something was cut off."""
    raw = text.encode("utf-8", errors="replace")  # a file name can have bytes that no text has
    if len(raw) <= num_bytes:
        return raw.decode("utf-8")
    return raw[: num_bytes - 3].decode("utf-8", errors="ignore") + "..."
