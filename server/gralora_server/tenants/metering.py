"""Where requests meet quotas and counts: who may begin, and what each then uses. Knows no transport.

Prompt tokens are charged and counted when the first delta says how many there are, output tokens as deltas are read;
what is unread when a stream is left was generated all the same.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from gralora_runtime.adapters.catalogue.names import account_of, parse_reference
from gralora_runtime.adapters.catalogue.uploads import Share
from gralora_runtime.errors import GraloraError, InvalidRequestError, QueueFullError, QuotaExceededError, TooLateError
from gralora_runtime.request import Delta
from gralora_runtime.stream import RequestStream
from gralora_server.tenants.caller import Caller
from gralora_server.tenants.quotas import Quotas
from gralora_server.tenants.tab import Tab
from gralora_server.tenants.usage import OTHERS, Counts, Usage
from gralora_server.validation import AnyGenerateRequest

BYTES_OF_A_TOKEN = 4  # of text, in English; the first delta corrects it
REFUSED = (QuotaExceededError, QueueFullError, TooLateError)


@dataclass(frozen=True, slots=True)
class UploadMeter:
    """Of one upload call."""

    share: Share | None  # what the names of its tenant may take; None: as much as there is
    count: Callable[[str, int], None]  # so many bytes came for an adapter of this name


class Metering:
    """One for all servicers of a server."""

    def __init__(self, quotas: Quotas, usage: Usage) -> None:
        self._quotas = quotas
        self._usage = usage

    @contextmanager
    def admit(self, caller: Caller, request: AnyGenerateRequest) -> Iterator[Meter]:
        """A generation while it lasts. Raises `QuotaExceededError`."""
        # The field `adapter` is written over with what served the request.
        asked_for = [one.name for one in request.adapters] or [request.adapter]
        try:
            with self._quotas.admit(caller.tenant, estimated_tokens(request)) as tab:
                yield Meter(tab, self._usage, caller.tenant)
        except REFUSED:
            self._usage.refuse(caller.tenant, _name(asked_for))
            raise

    @contextmanager
    def upload(self, caller: Caller) -> Iterator[UploadMeter]:
        """An upload while it lasts."""

        def count(name: str, num_bytes: int) -> None:
            self._usage.add(caller.tenant, name, Counts(upload_bytes=num_bytes))

        try:
            yield UploadMeter(self._quotas.share_of_uploads(caller.tenant), count)
        except QuotaExceededError:
            self._usage.refuse(caller.tenant, OTHERS)
            raise


class Meter:
    """Of one generation."""

    def __init__(self, tab: Tab, usage: Usage, tenant: str) -> None:
        self._tab = tab
        self._usage = usage
        self._tenant = tenant
        self._adapter = ""

    def take_on(self, stream: RequestStream) -> MeteredStream:
        """The engine serves it. What is read from the answer is charged and counted."""
        self._adapter = account_of(stream.served_by)
        self._tab.take_on()
        self._add(Counts(requests=1))
        return MeteredStream(stream, self)

    def use(self, delta: Delta) -> None:
        started, num_tokens = delta.started, len(delta.token_ids)
        if started is not None:
            self._tab.start(started.prompt_tokens)
            self._add(Counts(prompt_tokens=started.prompt_tokens, cached_tokens=started.cached_tokens))
        if num_tokens:
            self._tab.generate(num_tokens)
            self._add(Counts(output_tokens=num_tokens))

    def _add(self, more: Counts) -> None:
        self._usage.add(self._tenant, self._adapter, more)


class MeteredStream(AsyncIterator[Delta]):
    """A request's stream, whose tokens count as soon as they are read."""

    def __init__(self, stream: RequestStream, meter: Meter) -> None:
        self.request_id = stream.request_id
        self.served_by = stream.served_by
        self._stream = stream
        self._meter = meter

    async def __anext__(self) -> Delta:
        delta = await anext(self._stream)
        self._meter.use(delta)
        return delta

    def hold(self) -> None:
        """See `RequestStream`."""
        self._stream.hold()

    def go_on(self) -> None:
        self._stream.go_on()

    async def aclose(self) -> None:
        """Leave the stream. Nothing is waited for: what is there is there, and nothing more comes."""
        await self._stream.aclose()
        with suppress(GraloraError):  # what ended the stream was told to its client, if that is still there
            async for delta in self._stream:
                self._meter.use(delta)


def estimated_tokens(request: AnyGenerateRequest) -> int:
    """Of the prompt, before it is tokenized."""
    match request.WhichOneof("prompt"):
        case "token_ids":
            return len(request.token_ids.ids)
        case "text":
            return -(-len(request.text) // BYTES_OF_A_TOKEN)
        case _:
            return -(-sum(len(turn.content) for turn in request.messages.messages) // BYTES_OF_A_TOKEN)


def _name(references: Sequence[str]) -> str:
    """Whose use it would have been, see `account_of`; of what can be no adapter, that of all others."""
    try:
        names = {parse_reference("adapter", reference).name if reference else "" for reference in references}
        return "+".join(sorted(names))
    except InvalidRequestError:
        return OTHERS
