"""The table of statuses: nothing is missing from it, nothing leaks through it, nothing outgrows a client's limits."""

from __future__ import annotations

import base64
import inspect
import urllib.parse

import grpc
import pytest
from google.rpc import status_pb2
from support.grpc_harness import unpack

from gralora_runtime import errors as runtime_errors
from gralora_runtime.errors import (
    AdapterError,
    AdapterRejectedError,
    ConfigError,
    EngineDeadError,
    GraloraError,
    InvalidRequestError,
    ModelUnsupportedError,
    RequestFailedError,
    StepFailedError,
)
from gralora_server import errors as server_errors
from gralora_server.errors import StalledClientError, StartingError, UsageFileError
from gralora_server.explanation import CODES, clip
from gralora_server.status import failure_of

NEVER_IN_A_CALL = {GraloraError, AdapterError, ConfigError, ModelUnsupportedError, UsageFileError}
OUR_BUGS = {EngineDeadError, RequestFailedError}


def all_errors() -> set[type[GraloraError]]:
    return {
        kind
        for module in (runtime_errors, server_errors)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, GraloraError)
    }


def test_every_error_that_a_call_can_meet_has_its_status() -> None:
    covered = {kind for kind in all_errors() if any(base in CODES for base in kind.__mro__)}

    assert all_errors() - NEVER_IN_A_CALL - OUR_BUGS == covered


def test_no_error_of_a_user_is_internal() -> None:
    assert grpc.StatusCode.INTERNAL not in CODES.values()
    assert grpc.StatusCode.UNKNOWN not in CODES.values()


@pytest.mark.parametrize("error", [ValueError("secret"), ConfigError("secret"), EngineDeadError()])
def test_what_is_not_in_the_table_is_hidden_behind_an_id(error: Exception, caplog) -> None:
    failure = failure_of(error)
    error_id = unpack(dict(failure.trailers))["ErrorInfo"].metadata["error_id"]

    assert failure.code is grpc.StatusCode.INTERNAL
    assert "secret" not in str(failure)
    assert error_id in caplog.text


def test_the_status_and_its_details_agree() -> None:
    """Clients refuse details whose code or message differ from those of the call."""
    failure = failure_of(InvalidRequestError("sampling.top_p", 2.0, "must be at most 1"))
    status = status_pb2.Status.FromString(dict(failure.trailers)["grpc-status-details-bin"])

    assert (failure.code.value[0], failure.message) == (status.code, status.message)


@pytest.mark.parametrize("character", ["x", "é", "\N{PILE OF POO}", "\udc80"])
def test_a_thousand_problems_fit_into_a_clients_metadata(character: str) -> None:
    """A client refuses more than 8 KiB, and would then show an error about metadata instead of ours."""
    error = AdapterRejectedError(character * 300, [f"{character * 50} {index}" for index in range(1000)])
    failure = failure_of(error)
    encoded = len(urllib.parse.quote(failure.message, safe=" ")) + sum(
        len(key) + (len(base64.b64encode(value)) if isinstance(value, bytes) else len(value)) + 32
        for key, value in failure.trailers
    )

    assert encoded < 8000
    assert failure.message.endswith("...")
    assert failure.message.encode()


def test_starting_says_when_to_come_back() -> None:
    failure = failure_of(StartingError())

    assert failure.code is grpc.StatusCode.UNAVAILABLE
    assert unpack(dict(failure.trailers))["RetryInfo"].retry_delay.seconds == 1


def test_a_bug_that_ended_one_request_is_internal_under_the_id_that_the_log_has(caplog) -> None:
    failure = failure_of(RequestFailedError("r1", "0123abcd"))

    assert failure.code is grpc.StatusCode.INTERNAL
    assert unpack(dict(failure.trailers))["ErrorInfo"].metadata["error_id"] == "0123abcd"
    assert caplog.text == "", "the engine has logged it, with its cause"


def test_a_step_that_failed_is_worth_another_try_and_says_when() -> None:
    failure = failure_of(StepFailedError("0123abcd"))
    details = unpack(dict(failure.trailers))

    assert failure.code is grpc.StatusCode.UNAVAILABLE
    assert (details["ErrorInfo"].reason, details["ErrorInfo"].metadata["error_id"]) == ("STEP_FAILED", "0123abcd")
    assert details["RetryInfo"].retry_delay.seconds == 1
    assert dict(failure.trailers)["grpc-retry-pushback-ms"] == "1000"


def test_a_stalled_client_is_a_slow_consumer() -> None:
    failure = failure_of(StalledClientError("r1", 30.0))

    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert unpack(dict(failure.trailers))["ErrorInfo"].reason == "SLOW_CONSUMER"


def test_clipping_never_cuts_a_character_in_two() -> None:
    assert clip("abc", 3) == "abc"
    assert clip("abcd", 3) == "..."
    assert clip("éééé", 7) == "éé..."


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 7 bytes")])
def test_a_lack_of_memory_is_worth_another_try(error: Exception) -> None:
    failure = failure_of(error)

    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(failure.trailers)["grpc-retry-pushback-ms"] == "1000"
    assert unpack(dict(failure.trailers))["ErrorInfo"].reason == "OUT_OF_MEMORY"
