"""What a client is told of an error, whatever the transport: which status, why, and when to come again.

One table of statuses, by gRPC's names. What is not in it is our bug: logged with its traceback, and hidden. All that is
told is bounded, because a gRPC client refuses the whole answer when its metadata exceeds 8 KiB.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

import grpc

from gralora_runtime.errors import (
    AdapterBusyError,
    AdapterCapacityError,
    AdapterConversionError,
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
    ChangesLostError,
    ConfigInvalidError,
    EngineStuckError,
    PermissionDeniedError,
    ReplicaLostError,
    ReplicasDifferError,
    RestartingError,
    StartingError,
    UnauthenticatedError,
)

# Bytes. The message travels twice in a gRPC status (percent-encoded, up to 3x, and in the details) and the details as
# base64 (4/3x); four metadata values and two copies elsewhere in the details stay below 8 KiB together.
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
    ReplicaLostError: grpc.StatusCode.UNAVAILABLE,
    # Every change may be made twice, so the same again mends it.
    ReplicasDifferError: grpc.StatusCode.UNAVAILABLE,
    ChangesLostError: grpc.StatusCode.UNAVAILABLE,
    DrainingError: grpc.StatusCode.UNAVAILABLE,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """`reason` is stable, `message` for people. `metadata` and `retry_after_s` are the error's own."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: Mapping[str, str]
    field: str = ""  # of the request, that is at fault
    retry_after_s: float | None = None


def explain(error: BaseException) -> Explanation:
    """Logs what is our bug."""
    if isinstance(error, RequestFailedError):  # a bug as well, which the engine has logged
        return _hidden(error.error_id)
    code = next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), None)
    if isinstance(error, GraloraError) and code is not None:
        return Explanation(
            code=code,
            message=clip(str(error), MAX_MESSAGE_BYTES),
            reason=error.reason,
            metadata={key: clip(value, MAX_VALUE_BYTES) for key, value in error.metadata().items()},
            field=error.field if isinstance(error, InvalidRequestError) else "",
            retry_after_s=error.retry_after_s,
        )
    if out_of_memory(error):
        return explain(MemoryShortageError("the call was answered"))
    error_id = uuid.uuid4().hex
    _log.error("internal error %s", error_id, exc_info=error)
    return _hidden(error_id)


def _hidden(error_id: str) -> Explanation:
    return Explanation(
        code=grpc.StatusCode.INTERNAL,
        message=f"internal error {error_id}; the server's log has the cause",
        reason="INTERNAL",
        metadata={"error_id": error_id},
    )


def clip(text: str, num_bytes: int) -> str:
    """At most `num_bytes` of UTF-8, and no half character; says so when something was cut off."""
    raw = text.encode("utf-8", errors="replace")  # a file name can have bytes that no text has
    if len(raw) <= num_bytes:
        return raw.decode("utf-8")
    return raw[: num_bytes - 3].decode("utf-8", errors="ignore") + "..."
