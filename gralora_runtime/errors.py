"""Every error this project raises on purpose. A leaf file: it imports nothing of ours, so anybody may import it.

    GraloraError
    +-- InvalidRequestError      a field of the request is wrong: names the field and the value
    +-- AdapterError             names the adapter
    |   +-- AdapterNotFoundError      no adapter of that name is registered
    |   +-- AdapterVersionNotFoundError   the name has no such version
    |   +-- AdapterVersionLostError       it had, but its files are gone or others, and no copy is kept
    |   +-- AdapterRejectedError      the checkpoint is broken or asks for what we do not implement: all reasons at once
    |   +-- AdapterQuarantinedError   its logits were no numbers time and again: it gets no requests for a while
    |   +-- AdapterConversionError    it has no exact form in another dialect: all reasons at once
    |   +-- AdapterBusyError          requests hold it, so it cannot be unloaded
    |   +-- AdapterCapacityError      it does not fit beside those in use
    |   +-- AdapterSourceError        where it comes from could not be asked, or sent something else than it announced
    |   +-- AdapterUploadError        what a client sends is not what it announced, or cannot be kept here
    |   +-- AdapterUploadQuotaError   there is no room for what a client wants to send
    +-- CatalogueError           the catalogue on disk cannot be opened or written: names the file and a way out
    +-- QueueFullError           too many wait: try again after `retry_after_s`
    +-- TooLateError             it would not be served in time: try again after `retry_after_s`
    +-- QuotaExceededError       a tenant has used what it may: names the limit; try again after `retry_after_s`
    +-- SlowConsumerError        the client stopped reading its stream
    +-- DeadlineExceededError    the deadline passed, or cannot be met
    +-- RequestCancelledError    the client went away or somebody aborted it
    +-- NumericalError           the model or its adapter gave logits that are no numbers, for this request alone
    +-- RequestFailedError       our bug, met while working on this request alone: its cause is in the log, under an id
    +-- MemoryShortageError      memory ran out while working on it: try again
    +-- DescriptorShortageError  the server has as many files and connections open as it may: try again
    +-- StepFailedError          our bug, met while working on all requests of a step: try again
    +-- DrainingError            the server is shutting down
    +-- EngineDeadError          step after step failed, or the engine thread did: our bug
    +-- ConfigError              the server was started with impossible settings
    +-- ModelUnsupportedError    the base model cannot be served exactly: all reasons at once

Which gRPC status each becomes is one table in `gralora_server/explanation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence


class GraloraError(Exception):
    """Base of all errors that a user may see. `str(error)` is a whole sentence fit for a log line or a status."""

    reason: str = "INTERNAL"  # stable, UPPER_SNAKE: goes out as google.rpc.ErrorInfo.reason
    retry_after_s: float | None = None  # when the same request may well succeed; goes out as google.rpc.RetryInfo

    def metadata(self) -> dict[str, str]:
        """Machine-readable facts, sent as `ErrorInfo.metadata`."""
        return {}


class InvalidRequestError(GraloraError):
    """A field of a request is wrong. `field` is its path on the wire, for example `sampling.temperature`."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, value: object, problem: str) -> None:
        shown = repr(value)
        self.field = field
        self.value = shown if len(shown) <= 80 else shown[:77] + "..."
        self.problem = problem
        super().__init__(f"{field}: {problem} (got {self.value})")

    def renamed(self, field: str) -> InvalidRequestError:
        """The same, where the field has another name."""
        other = InvalidRequestError(field, None, self.problem)
        other.value = self.value
        other.args = (f"{field}: {self.problem} (got {self.value})",)
        return other

    def metadata(self) -> dict[str, str]:
        return {"field": self.field, "value": self.value}


class AdapterError(GraloraError):
    """Something about one named adapter."""

    reason = "ADAPTER"

    def __init__(self, name: str, message: str) -> None:
        self.name = name
        super().__init__(message)

    def metadata(self) -> dict[str, str]:
        return {"adapter": self.name}


class AdapterNotFoundError(AdapterError):
    """No adapter of that name is registered."""

    reason = "ADAPTER_NOT_FOUND"

    def __init__(self, name: str, similar: str = "") -> None:
        self.similar = similar
        meant = f"; did you mean {similar!r}?" if similar else ""
        super().__init__(name, f"no adapter named {name!r} is registered{meant}")

    def again(self) -> AdapterNotFoundError:
        """The same for somebody else: an error that is raised twice keeps the tracebacks of both."""
        return AdapterNotFoundError(self.name, self.similar)


class AdapterVersionNotFoundError(AdapterNotFoundError):
    """The adapter has no version of that number or content."""

    reason = "ADAPTER_VERSION_NOT_FOUND"

    def __init__(self, name: str, version: str, numbers: Sequence[int]) -> None:
        self.version = version
        known = ", ".join(map(str, numbers[-10:]))
        AdapterError.__init__(self, name, f"adapter {name!r} has no version {version} (it has {known})")

    def metadata(self) -> dict[str, str]:
        return {"adapter": self.name, "version": self.version}


class AdapterVersionLostError(AdapterError):
    """The version was served before, but its files have other content now or are gone, and there is no copy."""

    reason = "ADAPTER_VERSION_LOST"

    def __init__(self, name: str, number: int, problem: str) -> None:
        self.number = number
        super().__init__(name, f"version {number} of adapter {name!r} can no longer be read: {problem}")

    def metadata(self) -> dict[str, str]:
        return {"adapter": self.name, "version": str(self.number)}


class AdapterRejectedError(AdapterError):
    """The checkpoint is broken, is for another base model, or asks for something we do not implement."""

    reason = "ADAPTER_REJECTED"

    def __init__(self, name: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(name, f"adapter {name!r} cannot be served: " + "; ".join(self.problems))

    def metadata(self) -> dict[str, str]:
        return {"adapter": self.name, "problems": "; ".join(self.problems)}


class AdapterQuarantinedError(AdapterError):
    """Requests for this version ended with logits that are no numbers, one after the other. It will be tried again."""

    reason = "ADAPTER_QUARANTINED"

    def __init__(self, label: str, failures: int, problem: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        message = f"the last {failures} requests for adapter {label!r} failed alike: {problem}"
        super().__init__(label, f"{message}; it is tried again in {retry_after_s:.0f} s")


class AdapterConversionError(AdapterError):
    """The adapter cannot be written down exactly in the dialect that was asked for."""

    reason = "ADAPTER_CONVERSION"

    def __init__(self, name: str, to: str, problems: Sequence[str]) -> None:
        self.to = to
        self.problems = tuple(problems)
        super().__init__(name, f"adapter {name!r} cannot be converted to {to}: " + "; ".join(self.problems))


class AdapterBusyError(AdapterError):
    """The adapter cannot be unloaded while requests hold it."""

    reason = "ADAPTER_BUSY"

    def __init__(self, name: str, in_flight: int) -> None:
        self.in_flight = in_flight
        super().__init__(name, f"adapter {name!r} is in use by {in_flight} request(s)")


class AdapterCapacityError(AdapterError):
    """The adapter does not fit into the pool, alone or beside the pinned and leased ones."""

    reason = "ADAPTER_CAPACITY"

    def __init__(self, name: str, needed_bytes: int, pool_bytes: int) -> None:
        self.needed_bytes = needed_bytes
        self.pool_bytes = pool_bytes
        super().__init__(name, f"adapter {name!r} needs {needed_bytes} bytes of an adapter pool of {pool_bytes} bytes")


class AdapterSourceError(AdapterError):
    """Where the adapter comes from could not be asked, did not answer in time, or sent what it did not announce."""

    reason = "ADAPTER_SOURCE"

    def __init__(self, name: str, source: str, problem: str, retry_after_s: float | None = None) -> None:
        self.source = source
        self.problem = problem
        self.retry_after_s = retry_after_s
        super().__init__(name, f"adapter {name!r} cannot be had: {source} {problem}")

    def metadata(self) -> dict[str, str]:
        return {"adapter": self.name, "source": self.source}


class AdapterUploadError(AdapterError):
    """What a client sends is not what it announced, or this server keeps no uploads."""

    reason = "ADAPTER_UPLOAD"

    def __init__(self, name: str, problem: str) -> None:
        self.problem = problem
        super().__init__(name, f"the upload of adapter {name!r} {problem}")


class AdapterUploadQuotaError(AdapterError):
    """There is no room for an upload: it is too large, there are too many, or the disk is full."""

    reason = "ADAPTER_UPLOAD_QUOTA"

    def __init__(self, name: str, problem: str, retry_after_s: float | None = None) -> None:
        self.problem = problem
        self.retry_after_s = retry_after_s
        super().__init__(name, f"there is no room for an upload of adapter {name!r}: {problem}")


class CatalogueError(GraloraError):
    """The catalogue on disk cannot be opened, read or written. Says which file, what is wrong, and what to do."""

    reason = "CATALOGUE"

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        self.path = path
        self.problem = problem
        super().__init__(f"the catalogue {path} {problem}; {remedy}")


class QueueFullError(GraloraError):
    """Too much waits already, in all or of one tenant. `problem` says of what."""

    reason = "QUEUE_FULL"

    def __init__(self, problem: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"{problem}; try again in {retry_after_s:.1f} s")


class TooLateError(GraloraError):
    """What is known of the requests before it says that this one would not be served in time, so it is not begun."""

    reason = "TOO_LATE"

    def __init__(self, request_id: str, *, what: str, expected_s: float, limit_s: float, retry_after_s: float) -> None:
        """`what` would come after `expected_s`, and may after `limit_s` at most."""
        self.retry_after_s = retry_after_s
        self._metadata = {"expected_s": f"{expected_s:.3f}", "limit_s": f"{limit_s:.3f}"}
        super().__init__(
            f"request {request_id!r}: its {what} would come after about {expected_s:.1f} s, which is later than "
            f"{limit_s:.1f} s; try again in {retry_after_s:.1f} s"
        )

    def metadata(self) -> dict[str, str]:
        return self._metadata


class QuotaExceededError(GraloraError):
    """A tenant has used what its limits allow. `limit` is the limit's name in the configuration."""

    reason = "QUOTA_EXCEEDED"

    def __init__(self, tenant: str, limit: str, value: float, asked: str, retry_after_s: float | None = None) -> None:
        """`asked`: what there was no room for. `retry_after_s` None: waiting alone makes no room."""
        self.tenant = tenant
        self.limit = limit
        self.value = value
        self.asked = asked
        self.retry_after_s = retry_after_s
        hint = "" if retry_after_s is None else f"; try again in {retry_after_s:.3f} s"
        super().__init__(f"tenant {tenant!r} is at its limit {limit} = {value:.15g}, and asks for {asked}{hint}")

    def metadata(self) -> dict[str, str]:
        return {"tenant": self.tenant, "limit": self.limit, "value": f"{self.value:g}", "asked": self.asked}


class SlowConsumerError(GraloraError):
    """The client did not read its stream, and its bounded buffer is full."""

    reason = "SLOW_CONSUMER"

    def __init__(self, request_id: str, buffered: int) -> None:
        super().__init__(f"request {request_id!r}: the client left {buffered} messages unread")


class DeadlineExceededError(GraloraError):
    """The request's deadline passed before it finished."""

    reason = "DEADLINE_EXCEEDED"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request {request_id!r}: its deadline passed")


class RequestCancelledError(GraloraError):
    """The request was cancelled by its client or aborted by an operator."""

    reason = "CANCELLED"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request {request_id!r} was cancelled")


class NumericalError(GraloraError):
    """No token could be chosen: with these tokens the model, or the adapter's huge weights, gave NaN or infinity."""

    reason = "NON_FINITE_LOGITS"

    def __init__(self, request_id: str, adapter: str, problem: str) -> None:
        self.adapter = adapter
        self.problem = problem
        super().__init__(f"request {request_id!r} with adapter {adapter!r}: {problem}")

    def metadata(self) -> dict[str, str]:
        return {"adapter": self.adapter}


class RequestFailedError(GraloraError):
    """Our own code failed on this request, and on no other. The cause is in the server's log, under `error_id`."""

    def __init__(self, request_id: str, error_id: str) -> None:
        self.error_id = error_id
        super().__init__(f"request {request_id!r}: internal error {error_id}; the server's log has the cause")

    def metadata(self) -> dict[str, str]:
        return {"error_id": self.error_id}


class MemoryShortageError(GraloraError):
    """There was not enough memory. Whoever came last had to go, so that the others can go on."""

    reason = "OUT_OF_MEMORY"
    retry_after_s = 1.0

    def __init__(self, doing: str) -> None:
        super().__init__(f"memory ran out while {doing}; the same request may be sent again")


class DescriptorShortageError(GraloraError):
    """A file could not be opened for want of a descriptor, which says nothing about the file."""

    reason = "OUT_OF_DESCRIPTORS"
    retry_after_s = 1.0

    def __init__(self, file: str) -> None:
        super().__init__(
            f"{file} could not be opened: the server has as many files and connections open as it may; "
            "the same request may be sent again"
        )


class StepFailedError(GraloraError):
    """What a step computes for all its requests together failed, so all of them ended; the engine goes on."""

    reason = "STEP_FAILED"
    retry_after_s = 1.0

    def __init__(self, error_id: str) -> None:
        self.error_id = error_id
        super().__init__(f"a step of the engine failed (internal error {error_id}); the same request may be sent again")

    def metadata(self) -> dict[str, str]:
        return {"error_id": self.error_id}


class DrainingError(GraloraError):
    """The server is shutting down and takes no new work."""

    reason = "DRAINING"

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class EngineDeadError(GraloraError):
    """Step after step failed, or the engine's thread did. The cause is in the server's log, not in the message."""

    reason = "INTERNAL"

    def __init__(self) -> None:
        super().__init__("the engine has stopped because of an internal error")


class ConfigError(GraloraError):
    """The server was started with settings that cannot work."""

    reason = "CONFIG"


class ModelUnsupportedError(GraloraError):
    """The base model cannot be served exactly."""

    reason = "MODEL_UNSUPPORTED"

    def __init__(self, model: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"model {model!r} cannot be served exactly: " + "; ".join(self.problems))
