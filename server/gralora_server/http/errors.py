"""What a client is told of an error, as HTTP: a status, OpenAI's body with our reason as its `code`, and when to come
again.
"""

from __future__ import annotations

import math

import grpc

from gralora_runtime.errors import InvalidRequestError
from gralora_server.explanation import Explanation, explain
from gralora_server.http.answering import Json
from gralora_server.http.asking import in_their_words

Headers = list[tuple[bytes, bytes]]

STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error"),
    # Not 409 or 412, which clients of OpenAI try again or do not know.
    grpc.StatusCode.FAILED_PRECONDITION: (400, "invalid_request_error"),
    grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error"),
    grpc.StatusCode.NOT_FOUND: (404, "not_found_error"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    grpc.StatusCode.CANCELLED: (499, "request_cancelled"),
    grpc.StatusCode.INTERNAL: (500, "server_error"),
    grpc.StatusCode.UNAVAILABLE: (503, "server_error"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "timeout_error"),
}


class HttpError(Exception):
    """What HTTP alone can get wrong: said in its own terms, and nowhere else."""

    def __init__(self, status: int, reason: str, message: str, headers: Headers | None = None) -> None:
        self.status = status
        self.headers = headers or []
        self.reason = reason
        super().__init__(message)


def told(error: BaseException) -> tuple[Explanation, int, Json, Headers]:
    """What happened, and a response's status, body and headers. Logs what is our bug."""
    if isinstance(error, HttpError):
        known = Explanation(code=grpc.StatusCode.INVALID_ARGUMENT, message=str(error), reason=error.reason, metadata={})
        return known, error.status, _body(known, "invalid_request_error"), error.headers
    known = explain(in_their_words(error) if isinstance(error, InvalidRequestError) else error)
    status, kind = STATUSES[known.code]
    return known, status, _body(known, kind), _headers(known)


def _body(known: Explanation, kind: str) -> Json:
    return {
        "error": {
            "message": known.message,
            "type": kind,
            "param": known.field or None,
            "code": known.reason,
            "metadata": dict(known.metadata),
        }
    }


def _headers(known: Explanation) -> Headers:
    """OpenAI's clients wait for as long as these say, and obey when told not to come again."""
    if known.retry_after_s is not None:
        after_ms = math.ceil(known.retry_after_s * 1000)
        return [(b"retry-after", b"%d" % math.ceil(after_ms / 1000)), (b"retry-after-ms", b"%d" % after_ms)]
    if known.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return [(b"x-should-retry", b"false")]
    if known.code is grpc.StatusCode.UNAUTHENTICATED:
        return [(b"www-authenticate", b"Bearer")]
    return []
