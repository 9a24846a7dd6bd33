"""What the engine and the service are configured with, of the settings. Each checks its own once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import SecretStr

from gralora_runtime.config import EngineConfig
from gralora_runtime.errors import ConfigError
from gralora_server.config import HttpConfig, MetricsConfig, ServerConfig, TlsConfig, TracingConfig
from gralora_server.planner.prices import prices_of
from gralora_server.planner.profile import Profile
from gralora_server.settings.sections import ServerSettings, Settings
from gralora_server.settings.table import SETTINGS
from gralora_server.settings.values import parse_address

ENGINE_SECTIONS = ("adapters", "engine", "memory", "objectives")


def engine_config(settings: Settings, model: Path) -> EngineConfig:
    """`model` is where the settings' own has been found."""
    values: dict[str, Any] = {
        one.field: _plain(one.value(settings)) for one in SETTINGS if one.section in ENGINE_SECTIONS
    }
    profile = values.pop("profile")
    if profile is not None:
        values["prices"] = prices_of(Profile.read(profile))
    return EngineConfig(
        **values
        | {
            "model": model,
            "max_named_adapters": settings.server.metrics_max_adapters,
            "max_explained_requests": settings.server.explain_requests,
        },
    )


def server_config(settings: Settings) -> ServerConfig:
    server = settings.server
    host, port = parse_address(server.address)
    return ServerConfig(
        host=host,
        port=port,
        tls=_tls(server),
        auth_token_file=server.token_file,
        metrics=_metrics(server.metrics_address),
        http=_http(server.http_address),
        tracing=_tracing(server),
        ui=_http(server.ui_address),
        kserve=server.kserve,
        vllm_grpc=server.vllm_grpc,
        reflection=server.reflection,
        max_message_bytes=server.max_message_bytes,
        max_request_s=server.max_request_s,
        write_timeout_s=server.write_timeout_s,
        drain_grace_s=server.grace_s,
        step_timeout_s=server.step_timeout_s,
        max_connection_age_s=server.max_connection_age_s,
        state_dir=settings.adapters.state_dir,
    )


def _plain(value: object) -> object:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _tls(server: ServerSettings) -> TlsConfig | None:
    certificate, private_key, client_ca = server.tls_cert, server.tls_key, server.tls_client_ca
    if certificate is not None and private_key is not None:
        return TlsConfig(certificate=certificate, private_key=private_key, client_ca=client_ca)
    if certificate is None and private_key is None and client_ca is None:
        return None
    given = next(name for name in ("tls_client_ca", "tls_cert", "tls_key") if getattr(server, name) is not None)
    raise ConfigError(f"{given} is given alone: tls_cert and tls_key belong together, and tls_client_ca needs both")


def _metrics(address: str | None) -> MetricsConfig | None:
    if address is None:
        return None
    host, port = parse_address(address)
    return MetricsConfig(host=host.strip("[]"), port=port)


def _tracing(server: ServerSettings) -> TracingConfig | None:
    if server.otlp_endpoint is None:
        return None
    return TracingConfig(endpoint=server.otlp_endpoint, sampling=server.trace_sampling)


def _http(address: str | None) -> HttpConfig | None:
    if address is None:
        return None
    host, port = parse_address(address)
    return HttpConfig(host=host, port=port)
