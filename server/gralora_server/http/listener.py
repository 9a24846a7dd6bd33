"""The HTTP port: bound before the model loads, closed when all that it answered has been read."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from gralora_runtime.errors import ConfigError
from gralora_server.config import HttpConfig
from gralora_server.http.calls import Calls
from gralora_server.http.certificate import HttpCertificate
from gralora_server.http.protocol import BoundedProtocol

KEEP_ALIVE_S = 75  # of a connection that asks nothing; longer than gateways' own, which would meet a closed one
FAREWELL_S = 2
BACKLOG = 2048


class HttpListener:
    """Answers from `start` on, whatever the phase: the application says what it thinks of it."""

    def __init__(
        self, config: HttpConfig, certificate: HttpCertificate | None, calls: Calls, *, shares_port: bool
    ) -> None:
        """`certificate` None: in plain text. `shares_port`: with a supervisor."""
        # It tells of what anybody may send, and of connections that we cut; of our own bugs the application does.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._config = config
        self._server = _Server(
            uvicorn.Config(
                calls,
                interface="asgi3",
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                reset_contextvars=True,  # a pipelined request would begin as the caller of the one before
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=FAREWELL_S,
            )
        )
        self._certificate = certificate
        self._shares_port = shares_port
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Bind and answer. Returns the port. Raises ConfigError."""
        listening = self._bind()
        self._server.config.load()
        if self._certificate is not None:
            self._server.config.ssl = self._certificate.context()
        self._serving = asyncio.create_task(self._server.serve(sockets=[listening]))
        port: int = listening.getsockname()[1]
        return port

    async def stop(self) -> None:
        """Close the port and every connection."""
        if self._serving is not None:
            self._server.should_exit = True
            await self._serving

    def _bind(self) -> socket.socket:
        host, port = self._config.host.strip("[]"), self._config.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=self._shares_port)
        except OSError as cause:
            raise ConfigError(f"cannot serve HTTP on {host}:{port}: {cause}") from cause


class _Server(uvicorn.Server):
    """Signals are the service's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
