"""The server's certificate and whose clients' it accepts, from PEM files that may be renewed while it serves."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import grpc

from gralora_runtime.errors import ConfigError
from gralora_server.config import TlsConfig
from gralora_server.settings.sections import Settings


@dataclass(frozen=True, slots=True)
class _Pems:
    """What the files held at one time."""

    private_key: bytes
    certificate: bytes
    client_ca: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.private_key, self.certificate)], self.client_ca)


class Certificates:
    """Connections that are open keep what they were made with; new ones get what was put in force last."""

    def __init__(self, tls: TlsConfig) -> None:
        self._tls = tls
        self._pems = _read(tls)
        self._fresh: _Pems | None = None  # not told to gRPC yet

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._pems.configuration(),
            self._fetch,  # type: ignore[arg-type]  # the stubs do not know that it may return None
            require_client_authentication=self._pems.client_ca is not None,
        )

    def prepare(self, _settings: Settings) -> Callable[[], None]:
        """Reads the same files again: which they are cannot change."""
        pems = _read(self._tls)

        def put() -> None:
            self._pems = self._fresh = pems

        return put

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """gRPC asks before each handshake, in a thread of its own. None: what it has still holds."""
        fresh, self._fresh = self._fresh, None
        return None if fresh is None else fresh.configuration()


def _read(tls: TlsConfig) -> _Pems:
    """Checked, because gRPC would only refuse connections, one by one, for a reason that it keeps to itself."""
    try:
        pems = _Pems(
            private_key=tls.private_key.read_bytes(),
            certificate=tls.certificate.read_bytes(),
            client_ca=None if tls.client_ca is None else tls.client_ca.read_bytes(),
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.private_key, password=_no_password)
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
    except ssl.SSLError as cause:
        files = ", ".join(str(path) for path in (tls.certificate, tls.private_key, tls.client_ca) if path is not None)
        raise ConfigError(f"a TLS file is broken, or the key is another certificate's ({files}): {cause}") from cause
    except OSError as cause:
        raise ConfigError(f"a TLS file cannot be read: {cause}") from cause
    return pems


def _no_password() -> NoReturn:
    """Otherwise OpenSSL would ask for it on the terminal."""
    raise ConfigError("the private key has a password: a server starts without anybody to type it")
