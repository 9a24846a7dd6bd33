"""A generation's way through the server, whatever brought it: well formed, allowed, asked before, charged, begun.

Knows no transport: each brings a message of ours, and the time that its client gave it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from gralora_runtime.errors import DeadlineExceededError
from gralora_runtime.observation.timeline import Timeline
from gralora_runtime.observation.waterfall import waterfall
from gralora_runtime.request import GenerationRequest
from gralora_server import convert, validation
from gralora_server.base_model import base_name
from gralora_server.call_log import is_logged, note_request, request_fields
from gralora_server.gate import Gate
from gralora_server.ports import Engine
from gralora_server.repeats import Answer, Repeats, asked_for
from gralora_server.tenants.caller import current
from gralora_server.tenants.metering import MeteredStream, Metering
from gralora_server.tenants.rights import Rights
from gralora_server.tenants.suggestions import suggesting
from gralora_server.tracing.tracing import Trace, Tracing


class Generating:
    """One for all transports of a server. Each call is one request of the engine, or shares one that was sent before
    (`Repeats`), and leaves it at its end, however it ends.
    """

    def __init__(
        self, gate: Gate, rights: Rights, metering: Metering, *, max_request_s: float | None, tracing: Tracing
    ) -> None:
        self._gate = gate
        self._rights = rights
        self._metering = metering
        self._max_request_s = max_request_s
        self._tracing = tracing
        self._repeats = Repeats()

    @asynccontextmanager
    async def opened(
        self, request: validation.AnyGenerateRequest, *, remaining_s: float | None
    ) -> AsyncIterator[Answer]:
        """The answer to what the current caller asks. `remaining_s`: until its deadline; None: it has none.

        Writes the id and what serves it into `request`. Raises every error that a request can meet.
        """
        with self._gate.admit() as engine:
            validation.validate_generate(request)
            self._rights.check_use(request.adapter, [one.name for one in request.adapters])
            asked = asked_for(request)
            # From here on the id is part of the request, for the log line as well.
            request.request_id = request.request_id or uuid.uuid4().hex
            timeout_s = effective_timeout_s(request.request_id, remaining_s, self._max_request_s)
            trace = self._tracing.begin()
            sampled_in = trace.trace_id if trace.is_sampled else ""
            wanted = self._rights.owned(
                convert.from_generate_request(request, timeout_s=timeout_s, trace_id=sampled_in)
            )
            timeline, asked_s = None, time.monotonic()
            try:
                async with self._repeats.answer(asked, partial(self._run, engine, request, wanted)) as answer:
                    timeline = engine.timelines.find(wanted.request_id)
                    request.adapter = answer.served_by  # for the log line: a name does not say which content served
                    yield answer
            finally:
                # One that failed on its way in has its timeline, too; an older one is another request's of this id.
                timeline = timeline or engine.timelines.find(wanted.request_id, since_s=asked_s)
                if timeline is not None:
                    timeline.leave()
                    self._note_end(timeline, trace, wanted, request.request_id, engine)

    def _note_end(
        self, timeline: Timeline, trace: Trace, wanted: GenerationRequest, request_id: str, engine: Engine
    ) -> None:
        """A call of this request is over, for those who look on."""
        if not (is_logged() or trace.is_sampled):
            return
        found = waterfall(timeline)
        if trace.is_sampled:
            trace.end(wanted, found, request_id=request_id, base_model=base_name(engine.info()))
        note_request(request_fields(request_id, found) | ({"trace_id": trace.trace_id} if trace.trace_id else {}))

    @asynccontextmanager
    async def _run(
        self, engine: Engine, request: validation.AnyGenerateRequest, wanted: GenerationRequest
    ) -> AsyncIterator[MeteredStream]:
        """The request in the engine, on its tenant's account."""
        with self._metering.admit(current(), request) as meter:
            async with suggesting(engine.adapters, self._rights.sees()):
                stream = await engine.submit(wanted)
            metered = meter.take_on(stream)
            try:
                yield metered
            finally:
                await metered.aclose()


def effective_timeout_s(request_id: str, remaining_s: float | None, maximum_s: float | None) -> float | None:
    """The client's deadline or the server's limit, whichever is sooner; None when there is neither."""
    if remaining_s is not None and remaining_s <= 0:
        raise DeadlineExceededError(request_id)
    limits = [limit for limit in (remaining_s, maximum_s) if limit is not None]
    return min(limits, default=None)
