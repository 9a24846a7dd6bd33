"""The service's settings, checked once. What the engine needs is in `gralora_runtime.config`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gralora_runtime.errors import ConfigError

if TYPE_CHECKING:  # pydantic would take `gralora --help` a tenth of a second
    from gralora_server.tenants.settings import TenancySettings


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """PEM files. With `client_ca` only clients that show a certificate of that authority are served."""

    certificate: Path
    private_key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """Where the Prometheus page is served, in plain HTTP. `port` 0 lets the system choose."""

    host: str
    port: int

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"metrics port must be 0 to 65535, got {self.port}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """Where OpenAI's clients, or browsers, are served. `port` 0 lets the system choose."""

    host: str
    port: int

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"http port must be 0 to 65535, got {self.port}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingConfig:
    """Where spans go, and of which share of the requests whose clients have no trace of their own."""

    endpoint: str  # http://HOST:PORT or, with TLS, https://
    sampling: float = 1.0

    def __post_init__(self) -> None:
        if not self.endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"otlp_endpoint must begin with http:// or https://, got {self.endpoint!r}")
        if not 0 <= self.sampling <= 1:
            raise ConfigError(f"trace_sampling must be 0 to 1, got {self.sampling:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """`port` 0 lets the system choose. None means: off, or no limit."""

    host: str = "127.0.0.1"
    port: int = 50051
    tls: TlsConfig | None = None
    auth_token_file: Path | None = None
    tenancy: TenancySettings | None = None
    metrics: MetricsConfig | None = None
    http: HttpConfig | None = None
    tracing: TracingConfig | None = None
    ui: HttpConfig | None = None  # where the live page is served
    state_dir: Path | None = None  # what tenants used is kept there
    kserve: bool = False  # the protocol of KServe's and Triton's clients, on the same port
    vllm_grpc: bool = False  # vLLM's own protocol, as NVIDIA Dynamo speaks it, on the same port
    model_dir: Path | None = None  # where the base model lies, for whoever asks by vLLM's protocol
    reflection: bool = True
    max_message_bytes: int = 16 << 20  # received; 4 MiB of prompt text leave room for the rest
    max_request_s: float | None = None  # a request without a deadline gets this one, a longer one is cut to it
    write_timeout_s: float = 30.0  # a client that takes no message for so long is a slow consumer
    drain_grace_s: float = 30.0  # running requests may finish within it after SIGTERM
    step_timeout_s: float = 60.0  # a step that takes longer is stuck; the longest that serve take a few seconds
    supervised: bool = False  # a parent shares the port, and has our standard input open for as long as it lives
    max_connection_age_s: float | None = None  # lets balancers spread long-lived connections again

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be 0 to 65535, got {self.port}")
        for name in ("max_message_bytes", "max_request_s", "write_timeout_s", "step_timeout_s", "max_connection_age_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        if self.drain_grace_s < 0:
            raise ConfigError(f"drain_grace_s must be at least 0, got {self.drain_grace_s}")
