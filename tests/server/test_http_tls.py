"""HTTP with the server's certificate, which may be exchanged while it serves."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from support.certificates import LOCALHOST, Authority, Pair
from support.fake_engine import finished
from support.http_harness import TEXT, HttpServed, http_served
from support.tenants import certified, secret_of

from gralora_server.config import TlsConfig

URI = "spiffe://cluster.example/acme"


def trusting(authority: Authority) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def showing(authority: Authority, pair: Pair, folder: Path) -> ssl.SSLContext:
    context = trusting(authority)
    context.load_cert_chain(*pair.write(folder, "client"))
    return context


def get(s: HttpServed, context: ssl.SSLContext) -> tuple[str, bytes]:
    """The common name that a new connection is shown, and the first line of an answer."""
    with (
        socket.create_connection(("127.0.0.1", s.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        shown = connection.getpeercert(binary_form=True)
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        line = connection.recv(100).partition(b"\r\n")[0]
    assert shown is not None
    (name,) = x509.load_der_x509_certificate(shown).subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(name.value), line


async def test_the_next_connection_gets_the_newest_certificate_that_can_serve(tmp_path: Path) -> None:
    authority = Authority()
    certificate, key = authority.certify("first", LOCALHOST).write(tmp_path, "server")
    async with http_served(tls=TlsConfig(certificate=certificate, private_key=key)) as s:
        first = await asyncio.to_thread(get, s, trusting(authority))
        authority.certify("second", LOCALHOST).write(tmp_path, "server")
        second = await asyncio.to_thread(get, s, trusting(authority))
        certificate.write_bytes(b"junk")
        third = await asyncio.to_thread(get, s, trusting(authority))

    assert first == ("first", b"HTTP/1.1 200 OK")
    assert second == ("second", b"HTTP/1.1 200 OK")
    assert third == ("second", b"HTTP/1.1 200 OK")


async def test_where_clients_have_to_show_a_certificate_others_are_not_served(tmp_path: Path) -> None:
    authority, files = asking_for_certificates(tmp_path)
    knowing = showing(authority, authority.certify("client"), tmp_path)
    async with http_served(tls=files) as s:
        _, line = await asyncio.to_thread(get, s, knowing)
        try:
            _, refused = await asyncio.to_thread(get, s, trusting(authority))
        except (ssl.SSLError, ConnectionError):
            refused = b""  # by TLS 1.3 a client learns of it when it reads, and not always why

    assert line == b"HTTP/1.1 200 OK"
    assert refused == b""


@pytest.mark.parametrize(
    ("subject", "names"),
    [
        ("client-7", ()),
        ("client.acme.example", (x509.DNSName("client.acme.example"),)),
        (URI, (x509.RFC822Name("a@acme.example"), x509.UniformResourceIdentifier(URI))),
    ],
    ids=["common-name", "DNS", "URI"],
)
async def test_a_certificate_is_a_caller_by_any_name_in_it(
    subject: str, names: tuple[x509.GeneralName, ...], tmp_path: Path
) -> None:
    authority, files = asking_for_certificates(tmp_path)
    known = showing(authority, authority.certify("client-7", *names), tmp_path)
    async with http_served(tls=files, tenancy=certified(subject)) as s, client_of(s, known) as client:
        s.engine.script = [finished()]
        answer = await client.post("/v1/completions", json=TEXT)
        other = await client.post("/v1/completions", json=TEXT, headers=bearer("bob"))
        wrong = await client.post("/v1/completions", json=TEXT, headers=bearer("nobody"))
        denied = await client.delete("/v1/adapters/poet")

    assert (answer.status_code, other.status_code, wrong.status_code, denied.status_code) == (200, 200, 401, 403)
    assert [(request.tenant, request.weight) for request in s.engine.requests] == [("acme", 3.0), ("bob", 1.0)]
    assert s.engine.adapters.calls == []


async def test_a_certificate_of_nobody_is_refused_as_a_wrong_token_is(tmp_path: Path) -> None:
    authority, files = asking_for_certificates(tmp_path)
    unknown = showing(authority, authority.certify("stranger", x509.RFC822Name("client-7")), tmp_path)
    async with http_served(tls=files, tenancy=certified("client-7")) as s, client_of(s, unknown) as client:
        unnamed = await client.post("/v1/completions", json=TEXT)
        wrong = await client.post("/v1/completions", json=TEXT, headers=bearer("nobody"))

    assert unnamed.status_code == wrong.status_code == 401
    assert unnamed.json() == wrong.json()
    assert s.engine.requests == []


def asking_for_certificates(folder: Path) -> tuple[Authority, TlsConfig]:
    authority = Authority()
    certificate, key = authority.certify("server", LOCALHOST).write(folder, "server")
    ca = folder / "ca.pem"
    ca.write_bytes(authority.pem)
    return authority, TlsConfig(certificate=certificate, private_key=key, client_ca=ca)


def client_of(s: HttpServed, context: ssl.SSLContext) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=f"https://localhost:{s.port}", verify=context, timeout=10)


def bearer(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret_of(tenant)}"}
