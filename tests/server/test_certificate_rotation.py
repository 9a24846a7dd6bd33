"""The server's certificate may be exchanged while it serves, by writing over its files."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from support.certificates import LOCALHOST, Authority, Pair
from support.fake_engine import finished, token
from support.grpc_harness import Served, ask, ask_once, read_all, served

from gralora_runtime.errors import ConfigError
from gralora_server.config import TlsConfig
from gralora_server.tls import ServerCertificate

JUNK = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
STAYS = "the certificate from before stays in force"


def encrypted(key: bytes) -> bytes:
    password = BestAvailableEncryption(b"password")
    return load_pem_private_key(key, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, password)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def tls(authority: Authority, tmp_path: Path) -> TlsConfig:
    certificate, key = authority.certify("first", LOCALHOST).write(tmp_path, "server")
    return TlsConfig(certificate=certificate, private_key=key)


def trusting(authority: Authority) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(authority.pem)


async def shown(s: Served, authority: Authority) -> str:
    """The common name of the certificate that a new connection gets."""
    return await asyncio.to_thread(_shown, s.port, authority)


def _shown(port: int, authority: Authority) -> str:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("localhost", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True)).subject.rfc4514_string()


async def test_new_connections_get_the_new_certificate_and_old_ones_go_on(
    tls: TlsConfig, authority: Authority, tmp_path: Path
) -> None:
    async with served(tls=tls, credentials=trusting(authority)) as s:
        running = s.client.generation.StreamGenerate(ask())
        await running.read()
        before = await shown(s, authority)
        authority.certify("second", LOCALHOST).write(tmp_path, "server")
        after = await shown(s, authority)
        s.engine.streams["r1"].put(token(1))
        s.engine.streams["r1"].put(finished())
        rest = await read_all(running)
        s.engine.script = [finished()]
        answer = await s.client.generation.Generate(ask_once("r2"))

    assert (before, after) == ("CN=first", "CN=second")
    assert rest[-1].HasField("finished")
    assert answer.HasField("finished")


@pytest.mark.parametrize("broken", ["nothing", "no-pem", "another-key", "no-key", "encrypted"])
async def test_files_that_cannot_serve_leave_the_old_ones_in_force_until_they_can(
    broken: str, tls: TlsConfig, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    second = authority.certify("second", LOCALHOST)
    async with served(tls=tls, credentials=trusting(authority)) as s:
        match broken:
            case "nothing":
                tls.certificate.unlink()
            case "no-pem":
                tls.certificate.write_text("certificate")
            case "another-key":
                tls.certificate.write_bytes(second.certificate)
            case "no-key":
                tls.private_key.unlink()
            case "encrypted":
                tls.private_key.write_bytes(encrypted(second.key))
        meanwhile = [await shown(s, authority) for _ in range(3)]
        told = [record.getMessage() for record in caplog.records if STAYS in record.getMessage()]
        second.write(tmp_path, "server")
        after = await shown(s, authority)

    assert meanwhile == ["CN=first"] * 3
    assert len(told) == 1
    assert "PRIVATE KEY" not in told[0]
    assert after == "CN=second"


async def test_clients_of_a_new_authority_are_served_once_it_is_there(
    tls: TlsConfig, authority: Authority, tmp_path: Path
) -> None:
    ca, newcomers = tmp_path / "ca.pem", Authority("another authority")
    ca.write_bytes(authority.pem)
    mutual = TlsConfig(certificate=tls.certificate, private_key=tls.private_key, client_ca=ca)
    known, newcomer = authority.certify("known"), newcomers.certify("newcomer")
    async with served(tls=mutual, credentials=trusting(authority)) as s:
        before = [await is_served(s, authority, pair) for pair in (known, newcomer)]
        ca.write_bytes(authority.pem + newcomers.pem)
        after = [await is_served(s, authority, pair) for pair in (known, newcomer)]

    assert (before, after) == ([True, False], [True, True])


async def is_served(s: Served, authority: Authority, pair: Pair) -> bool:
    credentials = grpc.ssl_channel_credentials(authority.pem, pair.key, pair.certificate)
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.secure_channel(f"localhost:{s.port}", credentials, options=options) as channel:
        try:
            await channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
        except grpc.aio.AioRpcError as error:
            return error.code() is not grpc.StatusCode.UNAVAILABLE
        return True


async def test_a_certificate_that_stays_is_not_read_again(
    tls: TlsConfig, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = ServerCertificate._read, []

    def counted(certificate: ServerCertificate) -> grpc.ServerCertificateConfiguration:
        reads.append(certificate)
        return read(certificate)

    monkeypatch.setattr(ServerCertificate, "_read", counted)
    async with served(tls=tls, credentials=trusting(authority)) as s:
        for _ in range(3):
            await shown(s, authority)
        at_first = len(reads)
        authority.certify("second", LOCALHOST).write(tmp_path, "server")
        for _ in range(3):
            await shown(s, authority)

    assert (at_first, len(reads)) == (1, 2)


@pytest.mark.parametrize("file", ["certificate", "private_key", "client_ca"])
@pytest.mark.parametrize(
    "content",
    [None, b"", JUNK],
    ids=["absent", "empty", "junk"],
)
def test_files_that_cannot_serve_stop_the_start(
    file: str, content: bytes | None, tls: TlsConfig, authority: Authority, tmp_path: Path
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.pem)
    files = TlsConfig(certificate=tls.certificate, private_key=tls.private_key, client_ca=ca)
    path: Path = getattr(files, file)
    path.unlink()
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigError, match="TLS file"):
        ServerCertificate(files)


def test_a_key_of_another_certificate_stops_the_start(tls: TlsConfig, authority: Authority) -> None:
    tls.private_key.write_bytes(authority.certify("another").key)

    with pytest.raises(ConfigError, match="the private key is another certificate's"):
        ServerCertificate(tls)
