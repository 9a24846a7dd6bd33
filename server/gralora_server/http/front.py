"""The application over HTTP, made of what gRPC is served by: the same door, the same servicers, the same rights."""

from __future__ import annotations

from gralora_server.config import HttpConfig, ServerConfig
from gralora_server.gate import Gate
from gralora_server.generating import Generating
from gralora_server.http.adapters import AdapterEndpoints
from gralora_server.http.calls import Calls
from gralora_server.http.certificate import HttpCertificate
from gralora_server.http.generation import GenerationEndpoints
from gralora_server.http.listener import HttpListener
from gralora_server.http.server_endpoints import ServerEndpoints
from gralora_server.servicers import AdapterServicer, ServerServicer
from gralora_server.tenants.tenancy import Tenancy


def http_listener(
    config: HttpConfig,
    service: ServerConfig,
    *,
    gate: Gate,
    tenancy: Tenancy,
    generating: Generating,
    adapters: AdapterServicer,
    server: ServerServicer,
) -> HttpListener:
    """Raises ConfigError."""
    generation = GenerationEndpoints(gate, generating, write_timeout_s=service.write_timeout_s)
    endpoints = [*generation.all(), *AdapterEndpoints(gate, adapters).all()]
    calls = Calls(
        [*endpoints, *ServerEndpoints(gate, server, endpoints).all()],
        tenancy,
        max_body_bytes=service.max_message_bytes,
    )
    certificate = None if service.tls is None else HttpCertificate(service.tls)
    return HttpListener(config, certificate, calls, shares_port=service.supervised)
