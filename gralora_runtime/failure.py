"""What becomes of an exception that nobody raised on purpose: an id for the client, the cause in the log. No policy."""

from __future__ import annotations

import logging
import uuid

from gralora_runtime.errors import GraloraError, MemoryShortageError, RequestFailedError, StepFailedError
from gralora_runtime.shortage import out_of_memory

log = logging.getLogger(__name__)


def contained(error: BaseException) -> bool:
    """Whether an exception may be kept to where it happened. A panic of a Rust library is no `Exception`, but may."""
    return not isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))


def request_failed(request_id: str, cause: BaseException) -> GraloraError:
    """For a bug, or a lack of memory, that was met while working on this request alone."""
    if out_of_memory(cause):
        log.warning("memory ran out: request %r ends", request_id)
        return MemoryShortageError(f"request {request_id!r} was worked on")
    error_id = uuid.uuid4().hex
    log.error("internal error %s ends request %r", error_id, request_id, exc_info=cause)
    return RequestFailedError(request_id, error_id)


def step_failed(num_requests: int, cause: BaseException) -> GraloraError:
    """For a bug, or a lack of memory, that was met while working on all requests of a step."""
    if out_of_memory(cause):
        log.warning("memory ran out in a step: %d of its requests end", num_requests)
        return MemoryShortageError("a step was computed")
    error_id = uuid.uuid4().hex
    log.error("internal error %s ends the %d requests of a step", error_id, num_requests, exc_info=cause)
    return StepFailedError(error_id)
