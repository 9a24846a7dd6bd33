"""gRPC statuses and their google.rpc details, as exceptions.

GraloraClientError         code, reason, metadata, field_violations, retry_after_s
+-- InvalidArgumentError       a field is wrong: see field_violations
+-- NotFoundError              no adapter of that name
+-- FailedPreconditionError    the adapter is unsupported, in use, or does not fit
+-- ResourceExhaustedError     the queue is full or a quota used up: see retry_after_s; or this client read too slowly
+-- UnavailableError           nobody answers, or the server is starting or shutting down
+-- DeadlineError              the call's timeout passed
+-- CallCancelledError         the call was cancelled, here or by an operator
+-- AccessDeniedError          no token, or one that may not do this
+-- ServerError                everything else: the server's own fault
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """`field` is a path as in the proto, for example `sampling.temperature`."""

    field: str
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Details:
    """What the google.rpc messages in a status said."""

    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    field_violations: tuple[FieldViolation, ...] = ()
    retry_after_s: float | None = None


class GraloraClientError(Exception):
    """A call failed. `reason` is the server's stable word for why; empty when the status is not the server's own."""

    def __init__(self, code: grpc.StatusCode, message: str, details: _Details | None = None) -> None:
        details = details if details is not None else _Details()
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = details.reason
        self.metadata = dict(details.metadata)
        self.field_violations = details.field_violations
        self.retry_after_s = details.retry_after_s

    def __str__(self) -> str:
        return f"{self.message} ({self.reason or self.code.name})"


class InvalidArgumentError(GraloraClientError):
    """A field of the request is wrong."""


class NotFoundError(GraloraClientError):
    """There is no such adapter."""


class FailedPreconditionError(GraloraClientError):
    """The adapter cannot be served, unloaded or placed as things stand."""


class ResourceExhaustedError(GraloraClientError):
    """The server has no room now, or this client did not read its stream."""


class UnavailableError(GraloraClientError):
    """Nobody answers at the address, or the server is starting or shutting down."""


class DeadlineError(GraloraClientError):
    """The call's timeout passed."""


class CallCancelledError(GraloraClientError):
    """The call was cancelled."""


class AccessDeniedError(GraloraClientError):
    """The call carried no valid token, or one that may not do this."""


class ServerError(GraloraClientError):
    """The server failed, or speaks another protocol."""


_KINDS: dict[grpc.StatusCode, type[GraloraClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.UNAUTHENTICATED: AccessDeniedError,
    grpc.StatusCode.PERMISSION_DENIED: AccessDeniedError,
}


def client_error(error: grpc.RpcError) -> GraloraClientError:
    """The exception for what gRPC raised. Works for both of gRPC's APIs: each error is also the call."""
    call: Any = error
    code = call.code()
    return _KINDS.get(code, ServerError)(code, call.details() or code.name, _details(_rich_status(call)))


def passing_problem(error: grpc.RpcError, last: str) -> str:
    """What keeps the server from being ready; `last` is what did so far. Raises what waiting cannot cure."""
    problem = client_error(error)
    if isinstance(problem, UnavailableError):
        return str(problem)
    if isinstance(problem, DeadlineError):  # says only that we waited
        return last
    raise problem from error


def not_ready(timeout_s: float, last: str) -> DeadlineError:
    return DeadlineError(grpc.StatusCode.DEADLINE_EXCEEDED, f"the server was not ready within {timeout_s:g} s: {last}")


def cut_short() -> ServerError:
    return ServerError(grpc.StatusCode.UNKNOWN, "the stream ended without its last message")


def _rich_status(call: Any) -> status_pb2.Status | None:
    try:
        return rpc_status.from_call(call)
    except ValueError:  # a proxy changed the code or the message, so the details may belong to another failure
        return None


def _details(status: status_pb2.Status | None) -> _Details:
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    retry_after_s: float | None = None
    for detail in status.details if status is not None else ():
        detail.Unpack(info)
        detail.Unpack(bad)
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return _Details(
        reason=info.reason,
        metadata=dict(info.metadata),
        field_violations=tuple(FieldViolation(one.field, one.description) for one in bad.field_violations),
        retry_after_s=retry_after_s,
    )
