"""The trace of a request, for whoever traces: protocols, and nobody."""

from __future__ import annotations

from typing import Protocol

from gralora_runtime.observation.waterfall import Waterfall
from gralora_runtime.request import GenerationRequest
from gralora_server.config import TracingConfig


class Trace(Protocol):
    """Of one call's request. One that is not ended is not sent."""

    trace_id: str  # in hexadecimal; "": it is in none
    is_sampled: bool  # whoever collects has it, once it has ended

    def end(self, asked: GenerationRequest, found: Waterfall, *, request_id: str, base_model: str) -> None: ...


class Tracing(Protocol):
    """Called on the event loop."""

    def begin(self) -> Trace:
        """Of the call that is served: whether it is sampled is settled here."""

    def close(self) -> None:
        """Sends what is left. Waits for it, but not for long."""


class Untraced:
    """Of servers that trace nothing, and the trace of each of their requests."""

    trace_id = ""
    is_sampled = False

    def begin(self) -> Trace:
        return self

    def end(self, _asked: GenerationRequest, _found: Waterfall, *, request_id: str, base_model: str) -> None:
        """Nobody is told."""

    def close(self) -> None:
        """There is nothing left."""


def tracing(config: TracingConfig | None) -> Tracing:
    """Raises ConfigError if what it takes is not installed."""
    if config is None:
        return Untraced()
    from gralora_server.tracing.exporter import Exported  # a quarter of a second, and an optional extra

    return Exported(config)
