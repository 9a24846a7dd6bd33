"""The application over HTTP, made of what gRPC is served by: the same door, the same servicers, the same rights."""

from __future__ import annotations

from gralora_server.config import HttpConfig, ServerConfig
from gralora_server.http.adapters import AdapterEndpoints
from gralora_server.http.calls import Calls
from gralora_server.http.certificate import HttpCertificate
from gralora_server.http.generation import GenerationEndpoints
from gralora_server.http.listener import HttpListener
from gralora_server.http.server_endpoints import ServerEndpoints
from gralora_server.parts import Parts


def http_calls(service: ServerConfig, parts: Parts) -> Calls:
    """What an HTTP server serves, whoever has the port."""
    generation = GenerationEndpoints(parts.gate, parts.generating, write_timeout_s=service.write_timeout_s)
    endpoints = [*generation.all(), *AdapterEndpoints(parts.gate, parts.adapters).all()]
    return Calls(
        [*endpoints, *ServerEndpoints(parts.gate, parts.about, endpoints).all()],
        parts.tenancy,
        max_body_bytes=service.max_message_bytes,
    )


def http_listener(config: HttpConfig, service: ServerConfig, parts: Parts) -> HttpListener:
    """Raises ConfigError."""
    certificate = None if service.tls is None else HttpCertificate(service.tls)
    return HttpListener(config, certificate, http_calls(service, parts), shares_port=service.supervised)
