"""How to reach a server: address, TLS, metadata, timeouts, retries. Shared by both clients; opens nothing itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

ChannelOptions = list[tuple[str, int | str]]

RECONNECT_PAUSE_S = 0.1
MAX_MESSAGE_BYTES = 64 << 20  # a long generation with 20 logprobs a token does not fit gRPC's own 4 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """PEM files. No `root_certificates`: the system's. The pair is for servers that ask for a client certificate."""

    root_certificates: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    server_name: str | None = None  # expected in the server's certificate, where it is not the host of the address


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds per kind of call, each overridden by the call's own `timeout_s`. None: wait for ever."""

    generate_s: float | None = 600.0
    load_adapter_s: float | None = 120.0
    push_adapter_s: float | None = 3600.0
    other_s: float | None = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """The settings of one client."""

    target: str
    tls: ClientTls | None = None
    token: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    timeouts: Timeouts = field(default_factory=Timeouts)
    max_attempts: int = 4
    options: Sequence[tuple[str, int | str]] = ()

    def channel_options(self) -> ChannelOptions:
        """Ours first, so that the user's win."""
        options: ChannelOptions = [
            ("grpc.service_config", json.dumps(service_config(self.max_attempts))),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        ]
        if self.tls is not None and self.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return [*options, *self.options]

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None: no TLS."""
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.tls.root_certificates),
            private_key=_read(self.tls.private_key),
            certificate_chain=_read(self.tls.certificate),
        )

    def call_metadata(self) -> tuple[tuple[str, str], ...]:
        authorization = () if self.token is None else (("authorization", f"Bearer {self.token}"),)
        return (*authorization, *self.metadata.items())


def service_config(max_attempts: int) -> dict[str, object]:
    """gRPC's own retries: on UNAVAILABLE before the first answer, backing off or as the server's pushback says.

    Unloading is not retried: when only its answer was lost, a second one would claim that there is no such adapter. Nor
    is an upload, which gRPC could only send again from its beginning: `push` goes on where it was.
    """
    services = [{"service": f"gralora.v1.{name}"} for name in ("GenerationService", "AdapterService", "ServerService")]
    retried: dict[str, object] = {"name": services}
    if max_attempts > 1:
        retried["retryPolicy"] = {
            "maxAttempts": max_attempts,
            "initialBackoff": "0.2s",
            "maxBackoff": "5s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
    methods = ("UnloadAdapter", "UploadAdapter")
    sent_once = {"name": [{"service": "gralora.v1.AdapterService", "method": method} for method in methods]}
    return {"methodConfig": [retried, sent_once]}


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
