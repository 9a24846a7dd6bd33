"""The server's certificate for HTTP: as `tls.py` for gRPC, with the same files, read again for the next connection."""

from __future__ import annotations

import logging
import ssl

from gralora_runtime.errors import ConfigError
from gralora_server.config import TlsConfig
from gralora_server.tls import read_files, stamp_of

_log = logging.getLogger(__name__)


class HttpCertificate:
    """What is in force is replaced only by something that can serve. Used by the event loop alone."""

    def __init__(self, files: TlsConfig) -> None:
        """Raises ConfigError."""
        self._files = files
        self._stamp = stamp_of(files)
        self._newest = self._read()

    def context(self) -> ssl.SSLContext:
        """For a listener. Each handshake goes on with the newest."""
        first = self._newest
        first.sni_callback = self._exchange
        return first

    def _exchange(self, connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _first: ssl.SSLContext) -> None:
        """Called for each handshake, whether or not it names a server."""
        stamp = stamp_of(self._files)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._newest = self._read()
            except ConfigError as error:
                _log.error("the certificate from before stays in force: %s", error)
        connection.context = self._newest

    def _read(self) -> ssl.SSLContext:
        read_files(self._files)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._files.certificate, self._files.private_key)
            if self._files.client_ca is not None:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(self._files.client_ca)
        except (OSError, ssl.SSLError) as cause:
            raise ConfigError(f"a TLS file cannot be used: {cause}") from cause
        return context
