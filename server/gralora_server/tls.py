"""The server's certificate: read at start, and again for the next connection once its files have changed.

Connections that are open go on with what they began with.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from gralora_runtime.errors import ConfigError
from gralora_server.config import TlsConfig
from gralora_server.settings.sections import Settings

Stamp = tuple[tuple[int, int, int] | None, ...]

_log = logging.getLogger(__name__)


class ServerCertificate:
    """What is in force is replaced only by something that can serve."""

    def __init__(self, files: TlsConfig) -> None:
        """Raises ConfigError."""
        self._files = files
        self._lock = threading.Lock()
        self._stamp = stamp_of(self._files)
        self._initial = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        asks_for_certificates = self._files.client_ca is not None
        newer: Any = self._newer  # the stubs do not know that None means no change
        return grpc.dynamic_ssl_server_credentials(self._initial, newer, asks_for_certificates)

    def prepare(self, _settings: Settings) -> Callable[[], None]:
        """See `Reloadable`. The next connection has them in any case: this says whether it can."""
        self._read()
        return _nothing

    def _newer(self) -> grpc.ServerCertificateConfiguration | None:
        """gRPC asks for each connection, in threads of its own. None: nothing has changed, or not to the better."""
        with self._lock:
            stamp = stamp_of(self._files)
            if stamp == self._stamp:
                return None
            # Before they are read: what is written meanwhile changes it again.
            self._stamp = stamp
        try:
            read = self._read()
        except ConfigError as error:
            _log.error("the certificate from before stays in force: %s", error)
            return None
        _log.info("new connections get the certificate of %s as it is now", self._files.certificate)
        return read

    def _read(self) -> grpc.ServerCertificateConfiguration:
        private_key, certificate, client_ca = read_files(self._files)
        return grpc.ssl_server_certificate_configuration([(private_key, certificate)], client_ca)


def read_files(files: TlsConfig) -> tuple[bytes, bytes, bytes | None]:
    """The key, the certificate and the clients' authority, that belong together. Raises ConfigError."""
    try:
        private_key, certificate = files.private_key.read_bytes(), files.certificate.read_bytes()
        client_ca = None if files.client_ca is None else files.client_ca.read_bytes()
        _check(private_key, certificate, client_ca)
    except OSError as cause:
        raise ConfigError(f"a TLS file cannot be read: {cause}") from cause
    except (ValueError, TypeError, UnsupportedAlgorithm) as cause:
        paths = (files.certificate, files.private_key, files.client_ca)
        named = ", ".join(str(path) for path in paths if path is not None)
        raise ConfigError(f"a TLS file is broken ({named}): {cause}") from cause
    return private_key, certificate, client_ca


def stamp_of(files: TlsConfig) -> Stamp:
    """It differs once one of them has changed."""
    paths = (files.private_key, files.certificate, files.client_ca)
    return tuple(_stamp(path) for path in paths if path is not None)


def _nothing() -> None:
    pass


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """None: it is not there, as for a moment while somebody replaces it."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _check(private_key: bytes, certificate: bytes, client_ca: bytes | None) -> None:
    """Raises what `cryptography` does, or ValueError."""
    public = load_pem_private_key(private_key, password=None).public_key()
    if x509.load_pem_x509_certificates(certificate)[0].public_key() != public:
        raise ValueError("the private key is another certificate's")
    if client_ca is not None:
        x509.load_pem_x509_certificates(client_ca)
