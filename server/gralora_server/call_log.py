"""One line of the log for each call, whatever the transport: JSON, because its strings are whatever a client sent."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import grpc

from gralora_server.explanation import clip
from gralora_server.tenants.caller import current

QUIET_S = 10.0  # between two lines of one `SparseLog`

Clock = Callable[[], float]

_calls = logging.getLogger("gralora_server.calls")


def log_call(fields: Mapping[str, object]) -> None:
    """See `call_fields`."""
    _calls.info("%s", json.dumps(fields))


class SparseLog:
    """For lines that anybody can cause: one is written every `QUIET_S` at most, and says how many were not."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._quiet_until_s = -math.inf
        self._num_dropped = 0

    def write(self, fields: dict[str, object]) -> None:
        now_s = self._clock()
        if now_s < self._quiet_until_s:
            self._num_dropped += 1
            return
        dropped = {"lines_dropped": self._num_dropped} if self._num_dropped else {}
        log_call(fields | dropped)
        self._quiet_until_s, self._num_dropped = now_s + QUIET_S, 0


def call_fields(method: str, request: Any, code: grpc.StatusCode, duration_s: float) -> dict[str, object]:
    """Of the current caller's call: which message it brought, if it came so far, and how it ended."""
    adapter = _first_of(request, "adapter", "name", "model_name", "lora_name")
    tenant = current().tenant
    return {
        "method": method,
        "request_id": clip(_first_of(request, "request_id", "id"), 128),
        "adapter": clip(adapter, 128),
        "code": code.name,
        "duration_ms": round(duration_s * 1000, 1),
    } | ({"tenant": tenant} if tenant else {})


def _first_of(request: Any, *fields: str) -> str:
    """What one of them says: messages of different protocols have different ones."""
    return next((said for field in fields if (said := getattr(request, field, ""))), "")
