"""Errors that only a server has. They join the tree of `gralora_runtime.errors`.

GraloraError
+-- SlowConsumerError
|   +-- StalledClientError   the transport could hand the client no message for too long
+-- StartingError            the model is still loading
+-- RestartingError          the engine's process has ended, and another is on its way
+-- EngineStuckError         a step of the engine does not end
+-- ReplicaLostError         of several replicas, the one that served a call is gone
+-- ReplicasDifferError      a change was made by some replicas, and not by others
+-- ChangesLostError         whoever hands changes to all replicas cannot be reached
+-- UnauthenticatedError     no bearer token, or none of ours
+-- PermissionDeniedError    we know the caller, who may not do this
+-- ConfigError
|   +-- ConfigInvalidError   the configuration says what it may not: all problems at once, each with its place
|   +-- UsageFileError       what tenants used cannot be kept
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gralora_runtime.errors import ConfigError, GraloraError, SlowConsumerError


class StalledClientError(SlowConsumerError):
    """The client left its flow-control window full, so a message could not be sent."""

    def __init__(self, request_id: str, timeout_s: float) -> None:
        GraloraError.__init__(self, f"request {request_id!r}: the client read nothing for {timeout_s:g} s")


class StartingError(GraloraError):
    """The port is open but the model is still loading."""

    reason = "STARTING"
    retry_after_s = 1.0

    def __init__(self) -> None:
        super().__init__("the server is starting: its model is still loading")


class RestartingError(GraloraError):
    """The process that serves has ended, and another one is started in its place."""

    reason = "ENGINE_RESTARTING"
    retry_after_s = 1.0

    def __init__(self) -> None:
        super().__init__("the engine's process has ended; another one is being started")


class EngineStuckError(GraloraError):
    """A step takes longer than any should. Whoever has a request in it waits on, but nobody else need join them."""

    reason = "ENGINE_STUCK"
    retry_after_s = 2.0

    def __init__(self) -> None:
        super().__init__("the engine is stuck in a step, and takes no requests until that ends")


class ReplicaLostError(GraloraError):
    """Nobody ended the call: its replica is gone, or was never reached."""

    reason = "REPLICA_LOST"
    retry_after_s = 1.0

    def __init__(self) -> None:
        super().__init__("the replica that this call was for is gone; others serve")


class ReplicasDifferError(GraloraError):
    """A change was made by some replicas only. `refusals` is what the others said, by their names."""

    reason = "REPLICAS_DIFFER"
    retry_after_s = 1.0

    def __init__(self, method: str, num_replicas: int, refusals: Mapping[str, str]) -> None:
        self.refusals = dict(refusals)
        said = "; ".join(f"{name}: {why}" for name, why in sorted(refusals.items()))
        done = num_replicas - len(refusals)
        super().__init__(f"{method} was done by {done} of {num_replicas} replicas, so ask for it again ({said})")


class ChangesLostError(GraloraError):
    """A change cannot be handed to all replicas now. What was asked may or may not happen."""

    reason = "CHANGES_LOST"
    retry_after_s = 2.0

    def __init__(self) -> None:
        super().__init__("the replicas' common list of changes cannot be reached: ask again")


class UnauthenticatedError(GraloraError):
    """The call carries no bearer token, or one that is not ours. The message does not say how close it came."""

    reason = "UNAUTHENTICATED"

    def __init__(self) -> None:
        super().__init__("send a valid token as metadata: authorization: Bearer TOKEN")


class PermissionDeniedError(GraloraError):
    """We know the caller, who may not do this: `what` goes on after "may not"."""

    reason = "PERMISSION_DENIED"

    def __init__(self, what: str) -> None:
        super().__init__(f"this caller may not {what}")


class ConfigInvalidError(ConfigError):
    """A configuration says what it may not, or differs in what cannot change in a running server."""

    reason = "CONFIG_INVALID"

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))

    def metadata(self) -> dict[str, str]:
        return {"problems": "; ".join(self.problems)}


class UsageFileError(ConfigError):
    """The file of what tenants used cannot be opened, read or written, or is none."""

    reason = "USAGE_FILE"

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        super().__init__(f"usage cannot be kept in {path}: it {problem}")
