"""Statuses and details, as exceptions; and who may connect."""

from __future__ import annotations

import socket
from pathlib import Path

import grpc
import pytest
from support.both_clients import Connect, call, connect_async, connect_sync
from support.fake_engine import finished
from support.grpc_harness import served

from gralora_runtime.errors import (
    AdapterCapacityError,
    AdapterNotFoundError,
    AdapterRejectedError,
    AdapterVersionLostError,
    AdapterVersionNotFoundError,
    InvalidRequestError,
    QueueFullError,
    SlowConsumerError,
)
from gralora_server.client import (
    AccessDeniedError,
    ClientTls,
    FailedPreconditionError,
    FieldViolation,
    GraloraClientError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)
from gralora_server.config import TlsConfig
from gralora_server.errors import StartingError

both = pytest.mark.parametrize("connect", [connect_sync, connect_async], ids=["sync", "async"])
Code = grpc.StatusCode
PEMS = Path(__file__).parent.parent / "server" / "tls"
TOKEN = "a-token-of-enough-characters"

TABLE = [
    (AdapterNotFoundError("p"), NotFoundError, Code.NOT_FOUND, "ADAPTER_NOT_FOUND", {"adapter": "p"}),
    (
        AdapterVersionNotFoundError("p", "4", (1, 2)),
        NotFoundError,
        Code.NOT_FOUND,
        "ADAPTER_VERSION_NOT_FOUND",
        {"adapter": "p", "version": "4"},
    ),
    (
        AdapterVersionLostError("p", 4, "gone"),
        FailedPreconditionError,
        Code.FAILED_PRECONDITION,
        "ADAPTER_VERSION_LOST",
        {"adapter": "p", "version": "4"},
    ),
    (
        AdapterRejectedError("p", ["no", "never"]),
        FailedPreconditionError,
        Code.FAILED_PRECONDITION,
        "ADAPTER_REJECTED",
        {"adapter": "p", "problems": "no; never"},
    ),
    (
        AdapterCapacityError("p", 2, 1),
        FailedPreconditionError,
        Code.FAILED_PRECONDITION,
        "ADAPTER_CAPACITY",
        {"adapter": "p"},
    ),
    (SlowConsumerError("r", 9), ResourceExhaustedError, Code.RESOURCE_EXHAUSTED, "SLOW_CONSUMER", {}),
]


@both
@pytest.mark.parametrize(("raised", "kind", "code", "reason", "metadata"), TABLE, ids=lambda value: str(value)[:20])
async def test_a_failure_has_its_type_code_reason_and_metadata(
    connect: Connect, raised, kind: type[GraloraClientError], code: grpc.StatusCode, reason: str, metadata
) -> None:
    async with served() as s, connect(s.port) as client:
        s.engine.refusals = [raised]
        with pytest.raises(kind) as caught:
            await call(client, "generate", "hi")

    assert type(caught.value) is kind
    assert caught.value.code is code
    assert caught.value.reason == reason
    assert caught.value.metadata == metadata
    assert caught.value.message == str(raised)
    assert len(s.engine.requests) == 1, "only UNAVAILABLE is tried again"


@both
async def test_an_invalid_field_is_named(connect: Connect) -> None:
    async with served() as s, connect(s.port) as client:
        s.engine.refusals = [InvalidRequestError("sampling.top_k", 99, "is larger than the vocabulary")]
        with pytest.raises(InvalidArgumentError) as caught:
            await call(client.stream("hi"), "read")

    assert caught.value.field_violations == (FieldViolation("sampling.top_k", "is larger than the vocabulary"),)
    assert caught.value.metadata == {"field": "sampling.top_k", "value": "99"}


@both
async def test_a_full_queue_says_when_to_come_back(connect: Connect) -> None:
    async with served() as s, connect(s.port) as client:
        s.engine.refusals = [QueueFullError("1024 requests wait", 1.5)]
        with pytest.raises(ResourceExhaustedError) as caught:
            await call(client, "generate", "hi")

    assert caught.value.retry_after_s == 1.5


@both
async def test_a_bug_of_the_server_is_a_server_error(connect: Connect) -> None:
    async with served() as s, connect(s.port) as client:
        s.engine.refusals = [ZeroDivisionError("a secret")]
        with pytest.raises(ServerError) as caught:
            await call(client, "generate", "hi")

    assert caught.value.reason == "INTERNAL"
    assert caught.value.metadata.keys() == {"error_id"}
    assert "secret" not in str(caught.value)


@both
async def test_the_servers_pushback_is_obeyed(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to come back in 30 seconds, a call that has two makes no second attempt; without that it makes four."""
    monkeypatch.setattr(StartingError, "retry_after_s", 30.0)
    async with served() as s, connect(s.port) as client:
        s.engine.refusals = [StartingError() for _ in range(4)]
        with pytest.raises(GraloraClientError):
            await call(client, "generate", "hi", timeout_s=2.0)

    assert len(s.engine.requests) == 1


@both
async def test_nobody_listening_is_unavailable_without_a_reason(connect: Connect) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        async with connect(reserved.getsockname()[1], max_attempts=1) as client:
            with pytest.raises(UnavailableError) as caught:
                await call(client, "info")

    assert caught.value.reason == ""


@both
async def test_a_token_is_sent_with_every_call(connect: Connect, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKEN)
    async with served(auth_token_file=tokens) as s:
        s.engine.script = [finished()]
        async with connect(s.port, token=TOKEN) as client:
            await call(client, "generate", "hi")
            await call(client.stream("hi"), "read")
            await call(client, "adapters.list")
            await call(client, "info")
        async with connect(s.port) as client:
            with pytest.raises(AccessDeniedError):
                await call(client, "adapters.list")


@both
async def test_metadata_is_sent_with_every_call(connect: Connect, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKEN)
    async with (
        served(auth_token_file=tokens) as s,
        connect(s.port, metadata={"authorization": f"Bearer {TOKEN}"}) as client,
    ):
        assert (await call(client, "info")).model == "fake"


@both
async def test_tls_with_the_servers_authority(connect: Connect) -> None:
    config = TlsConfig(certificate=PEMS / "server.pem", private_key=PEMS / "server.key")
    trusting = ClientTls(root_certificates=PEMS / "ca.pem")
    async with served(tls=config) as s, connect(s.port, host="localhost", tls=trusting) as client:
        assert (await call(client, "info")).model == "fake"


@both
async def test_tls_refuses_a_server_of_another_authority(connect: Connect) -> None:
    config = TlsConfig(certificate=PEMS / "server.pem", private_key=PEMS / "server.key")
    async with served(tls=config) as s, connect(s.port, host="localhost", tls=ClientTls(), max_attempts=1) as client:
        with pytest.raises(UnavailableError):
            await call(client, "info")


@both
async def test_mutual_tls(connect: Connect) -> None:
    config = TlsConfig(certificate=PEMS / "server.pem", private_key=PEMS / "server.key", client_ca=PEMS / "ca.pem")
    anonymous = ClientTls(root_certificates=PEMS / "ca.pem")
    known = ClientTls(
        root_certificates=PEMS / "ca.pem", certificate=PEMS / "client.pem", private_key=PEMS / "client.key"
    )
    async with served(tls=config) as s:
        async with connect(s.port, host="localhost", tls=known) as client:
            assert (await call(client, "info")).model == "fake"
        async with connect(s.port, host="localhost", tls=anonymous, max_attempts=1) as client:
            with pytest.raises(UnavailableError):
                await call(client, "info")
