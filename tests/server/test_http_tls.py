"""HTTP with the server's certificate, which may be exchanged while it serves."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

from cryptography import x509
from support.certificates import LOCALHOST, Authority
from support.http_harness import HttpServed, http_served

from gralora_server.config import TlsConfig


def trusting(authority: Authority) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
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
    authority = Authority()
    certificate, key = authority.certify("server", LOCALHOST).write(tmp_path, "server")
    client, client_key = authority.certify("client").write(tmp_path, "client")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.pem)
    knowing = trusting(authority)
    knowing.load_cert_chain(client, client_key)
    async with http_served(tls=TlsConfig(certificate=certificate, private_key=key, client_ca=ca)) as s:
        _, line = await asyncio.to_thread(get, s, knowing)
        try:
            _, refused = await asyncio.to_thread(get, s, trusting(authority))
        except (ssl.SSLError, ConnectionError):
            refused = b""  # by TLS 1.3 a client learns of it when it reads, and not always why

    assert line == b"HTTP/1.1 200 OK"
    assert refused == b""
