"""What becomes of a request that has ended, for whoever traces: a protocol, and nobody."""

from __future__ import annotations

from typing import Protocol

from gralora_runtime.observation.waterfall import Waterfall
from gralora_runtime.request import GenerationRequest
from gralora_server.config import TracingConfig


class Tracing(Protocol):
    """Called on the event loop, once for each call's request."""

    is_on: bool

    def note(self, asked: GenerationRequest, found: Waterfall, *, request_id: str, base_model: str) -> str:
        """Returns the trace's id, in hexadecimal; "" if the request is in none."""

    def close(self) -> None:
        """Sends what is left. Waits for it, but not for long."""


class Untraced:
    """Of servers that trace nothing."""

    is_on = False

    def note(self, _asked: GenerationRequest, _found: Waterfall, *, request_id: str, base_model: str) -> str:  # noqa: ARG002
        return ""

    def close(self) -> None:
        """There is nothing left."""


def tracing(config: TracingConfig | None) -> Tracing:
    """Raises ConfigError if what it takes is not installed."""
    if config is None:
        return Untraced()
    from gralora_server.tracing.exporter import Exported  # a quarter of a second, and an optional extra

    return Exported(config)
