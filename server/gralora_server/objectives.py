"""What the operator wants of latency, put in force in a running engine. The engine decides what it means."""

from __future__ import annotations

from collections.abc import Callable

from gralora_server.gate import Gate
from gralora_server.ports import Engine
from gralora_server.settings.sections import Settings


class Objectives:
    """An engine starts with those of its configuration."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._newer: Settings | None = None  # since the start

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """See `Reloadable`."""

        def put() -> None:
            self._newer = settings
            if self._gate.loaded is not None:
                self.inform(self._gate.loaded)

        return put

    def inform(self, engine: Engine) -> None:
        """What came while it was loading is not in its configuration."""
        if self._newer is not None:
            engine.first_token_s = self._newer.objectives.first_token_s
