"""Who may call, and over what."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.fake_engine import finished
from support.grpc_harness import ask, ask_once, failure, read_all, served

from gralora.v1 import adapters_pb2
from gralora_runtime.errors import ConfigError
from gralora_server.config import TlsConfig
from gralora_server.tenants.token_file import read_token_file

ADMIN, GENERATE = "admin-token-0123456789", "generate-token-0123456789"
PEMS = Path(__file__).parent / "tls"
SERVER_TLS = TlsConfig(certificate=PEMS / "server.pem", private_key=PEMS / "server.key")
MUTUAL_TLS = TlsConfig(certificate=PEMS / "server.pem", private_key=PEMS / "server.key", client_ca=PEMS / "ca.pem")
Code = grpc.StatusCode


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# who: the operators\n\n{ADMIN}\n{GENERATE} generate\n")
    return path


def bearing(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@pytest.mark.parametrize(
    "metadata",
    [(), bearing("wrong"), bearing(""), bearing(ADMIN + "x"), bearing(ADMIN[:-1]), (("authorization", ADMIN),)],
    ids=["none", "wrong", "empty", "longer", "shorter", "no-scheme"],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "stream"])
async def test_a_call_without_one_of_our_tokens_is_refused(metadata, streaming: bool, tokens: Path) -> None:
    async with served(auth_token_file=tokens) as s:
        if streaming:
            failed = await failure(read_all(s.client.generation.StreamGenerate(ask(), metadata=metadata)))
        else:
            failed = await failure(s.client.generation.Generate(ask_once(), metadata=metadata))

    assert failed.code is Code.UNAUTHENTICATED
    assert failed.info.reason == "UNAUTHENTICATED"
    assert s.engine.requests == []


@pytest.mark.parametrize("token", [ADMIN, GENERATE])
async def test_a_call_with_a_token_is_served(token: str, tokens: Path) -> None:
    async with served(auth_token_file=tokens) as s:
        s.engine.script = [finished()]
        answers = await read_all(s.client.generation.StreamGenerate(ask(), metadata=bearing(token)))
        listed = await s.client.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest(), metadata=bearing(token))

    assert answers[-1].HasField("finished")
    assert len(listed.adapters) == 1


@pytest.mark.parametrize("method", ["LoadAdapter", "UnloadAdapter", "PinAdapter"])
async def test_only_an_admin_changes_adapters(method: str, tokens: Path) -> None:
    request = getattr(adapters_pb2, f"{method}Request")(name="poet")
    async with served(auth_token_file=tokens) as s:
        call = getattr(s.client.adapters, method)
        failed = await failure(call(request, metadata=bearing(GENERATE)))
        refused_calls = list(s.engine.adapters.calls)
        await call(request, metadata=bearing(ADMIN))

    assert failed.code is Code.PERMISSION_DENIED
    assert failed.info.reason == "PERMISSION_DENIED"
    assert refused_calls == []
    assert len(s.engine.adapters.calls) == 1


async def test_health_needs_no_token_but_reflection_does(tokens: Path) -> None:
    async with served(auth_token_file=tokens) as s:
        health = await s.client.health.Check(health_pb2.HealthCheckRequest())
        stub = reflection_pb2_grpc.ServerReflectionStub(s.client.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        failed = await failure(call.read())

    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert failed.code is Code.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "has no token"),
        ("# only a comment\n", "has no token"),
        ("short\n", "at least 16 characters"),
        (f"{ADMIN} root\n", "followed by admin or generate"),
        (f"{ADMIN} generate now\n", "followed by admin or generate"),
    ],
)
def test_a_token_file_that_cannot_be_meant_is_refused(content: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(content)

    with pytest.raises(ConfigError, match=problem) as caught:
        read_token_file(path)
    assert ADMIN not in str(caught.value)


@pytest.mark.parametrize("name", ["tokens", "\0"])
def test_a_token_file_that_is_not_there_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token_file(tmp_path / name)


async def test_tls_is_served() -> None:
    credentials = grpc.ssl_channel_credentials((PEMS / "ca.pem").read_bytes())
    async with served(tls=SERVER_TLS, credentials=credentials) as s:
        s.engine.script = [finished()]
        answer = await s.client.generation.Generate(ask_once())

    assert answer.HasField("finished")


async def test_plain_text_to_a_tls_port_is_not_served() -> None:
    async with served(tls=SERVER_TLS) as s:
        failed = await failure(s.client.generation.Generate(ask_once()))

    assert failed.code is Code.UNAVAILABLE
    assert s.engine.requests == []


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
async def test_with_a_client_authority_only_its_clients_are_served(known: bool) -> None:
    pair = [(PEMS / name).read_bytes() for name in ("client.key", "client.pem")] if known else [None, None]
    credentials = grpc.ssl_channel_credentials((PEMS / "ca.pem").read_bytes(), *pair)
    async with served(tls=MUTUAL_TLS, credentials=credentials) as s:
        s.engine.script = [finished()]
        call = s.client.generation.Generate(ask_once())
        outcome = (await call).HasField("finished") if known else (await failure(call)).code

    assert outcome is (True if known else Code.UNAVAILABLE)


async def test_a_certificate_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    tls = TlsConfig(certificate=tmp_path / "none.pem", private_key=tmp_path / "none.key")

    with pytest.raises(ConfigError, match="cannot be read"):
        async with served(tls=tls):
            pass
