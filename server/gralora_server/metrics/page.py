"""The HTTP port that is scraped: threads of its own, so that no scrape holds up the event loop or the engine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from gralora_runtime.errors import ConfigError
from gralora_server.config import MetricsConfig
from gralora_server.gate import Gate
from gralora_server.metrics.collector import EngineCollector
from gralora_server.metrics.tenants import TenantCollector
from gralora_server.tenants.usage import Usage

OPEN_METRICS_TYPE = "application/openmetrics-text"
OPEN_METRICS = f"{OPEN_METRICS_TYPE};version=1.0.0;escaping=allow-utf-8"
CLASSIC_TEXT = "text/plain;version=0.0.4"


class MetricsPage:
    """Open from its making until `close`."""

    def __init__(self, config: MetricsConfig, gate: Gate, usage: Usage) -> None:
        """Raises `ConfigError` if the address cannot be had."""
        registry = CollectorRegistry()
        registry.register(EngineCollector(gate))
        registry.register(TenantCollector(usage))
        ProcessCollector(registry=registry)
        kind = _Server6 if ":" in config.host else _Server
        try:
            self._server = make_server(config.host, config.port, _with_colons(make_wsgi_app(registry)), kind, _Handler)
        except OSError as cause:
            raise ConfigError(f"cannot serve metrics on {config.host}:{config.port}: {cause}") from cause
        self.port = self._server.server_port  # which the system chose if the configuration says 0
        self._thread = threading.Thread(target=self._server.serve_forever, name="gralora-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Blocks for up to half a second, until the port is closed."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _with_colons(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """Who can read OpenMetrics, which has exemplars, gets that; all others get the text that all read.

    In either series keep the names that they have: unless it is asked not to, prometheus_client 0.26 writes
    `vllm_num_requests_running` for `vllm:num_requests_running`, in the samples alone, and gateways would find nothing.
    """

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        accepted = OPEN_METRICS if OPEN_METRICS_TYPE in environ.get("HTTP_ACCEPT", "") else CLASSIC_TEXT
        return app(environ | {"HTTP_ACCEPT": accepted}, start_response)

    return answer


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # seconds without a byte after which a client has left

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name that http.server gives it
        """A scrape every few seconds is no news."""


class _Server(ThreadingWSGIServer):
    """One thread per scrape."""


class _Server6(_Server):
    address_family = socket.AF_INET6
