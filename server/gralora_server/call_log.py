"""One line of the log for each call, whatever the transport, and for each request of those that ask for several."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import grpc

from gralora_runtime.observation.timeline import Stage
from gralora_runtime.observation.waterfall import Waterfall
from gralora_server.call_line import CallLine, Fields
from gralora_server.explanation import clip
from gralora_server.tenants.caller import current

QUIET_S = 10.0  # between two lines of one `SparseLog`
LEFT = "cancelled"  # the outcome of a request whose call ended first

Clock = Callable[[], float]

_calls = logging.getLogger("gralora_server.calls")
_requests: ContextVar[list[Fields] | None] = ContextVar("requests", default=None)  # of the call that is served


def log_call(fields: Fields) -> None:
    """See `call_fields`. Of a call that was several requests a line for each, by the id that the engine knows it by;
    `client_id` is what its client calls it, where that is another one.
    """
    requests = _requests.get()
    for request in (requests or [{}]).copy():
        own = fields.get("request_id")
        named = {"client_id": own} if own and request and own != request["request_id"] else {}
        _calls.info("%s", CallLine({**fields, **request, **named}))
    if requests is not None:
        requests.clear()


def begin_call() -> None:
    """From here on this task's requests, and those of its own tasks, are one call's."""
    _requests.set([])


def is_logged() -> bool:
    return _calls.isEnabledFor(logging.INFO)


def note_request(fields: Fields) -> None:
    """Of the call that is served. See `request_fields`."""
    requests = _requests.get()
    if requests is not None:
        requests.append(fields)


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


def request_fields(request_id: str, found: Waterfall) -> dict[str, object]:
    """What one request took, and how it ended. Times are the sums of its stages."""
    name, _, version = found.adapter.rpartition("@")
    served = {"adapter": found.adapter} | ({"version": int(version)} if name and version.isdecimal() else {})
    times_s = {
        "queued": found.time_of(Stage.QUEUE, Stage.PREEMPTED),
        "load": found.time_of(Stage.ADAPTER),
        "prefill": found.time_of(Stage.PREFILL),
        "decode": found.time_of(Stage.DECODE),
        "paused": found.time_of(Stage.PAUSED),
    }
    if found.first_token_s is not None:
        times_s["first_token"] = found.first_token_s
    return {
        "request_id": clip(request_id, 128),
        **served,
        "outcome": found.outcome or LEFT,
        "prompt_tokens": found.prompt_tokens,
        "cached_tokens": found.cached_tokens,
        "generated_tokens": found.output_tokens,
        **{f"{name}_ms": round(seconds * 1000, 1) for name, seconds in times_s.items()},
    }


def _first_of(request: Any, *fields: str) -> str:
    """What one of them says: messages of different protocols have different ones."""
    return next((said for field in fields if (said := getattr(request, field, ""))), "")
