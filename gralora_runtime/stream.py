"""A request's deltas on their way from the engine's thread to one client. Lives on the event loop's thread alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from gralora_runtime.detokenizer import Detokenizer
from gralora_runtime.errors import GraloraError, SlowConsumerError
from gralora_runtime.failure import contained, request_failed
from gralora_runtime.request import Delta

# Unread deltas at which a client counts as gone: one of them is one token, so this is seconds of the fastest decoding.
MAX_UNREAD_DELTAS = 1024


class RequestStream(AsyncIterator[Delta]):
    """Yields deltas until the one with `finished`; raises the `GraloraError` that ended the request instead.

    Deltas that arrived while the client was busy are merged into one. Leaving early must go through `aclose`, which
    cancels the request.
    """

    def __init__(
        self, request_id: str, abort: Callable[[str], object], hold: Callable[[str, bool], object] = lambda *_: None
    ) -> None:
        """`abort` ends the request; `hold` makes it wait (True) or go on."""
        self.request_id = request_id
        self.served_by = ""  # the adapter and its version, such as "pirate@3"; "": the base model
        self.detokenizer: Detokenizer | None = None  # for deltas that come without their text
        self._abort = abort
        self._hold = hold
        self._is_held = False
        self._unread: list[Delta] = []
        self._error: GraloraError | None = None
        self._ended = False  # nothing more will be put
        self._wake = asyncio.Event()

    def put(self, delta: Delta) -> None:
        """Called by the engine's delivery. A client that left too much unread loses its request."""
        if self._ended:
            return
        self._unread.append(delta)
        self._ended = delta.finished is not None
        if len(self._unread) > MAX_UNREAD_DELTAS and not self._ended:
            unread = len(self._unread)
            self._unread.clear()
            self._abort(self.request_id)
            self.fail(SlowConsumerError(self.request_id, unread))
        self._wake.set()

    def fail(self, error: GraloraError) -> None:
        """End the stream with an error, after what is still unread."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._wake.set()

    def cancel(self) -> None:
        """Abort the request if it still runs; idempotent."""
        if not self._ended:
            self._ended = True
            self._abort(self.request_id)
            self._wake.set()

    def hold(self) -> None:
        """Its client does not take what there is: its place in the steps is for others until `go_on`."""
        if not (self._ended or self._is_held):
            self._is_held = True
            self._hold(self.request_id, True)

    def go_on(self) -> None:
        """It does again."""
        if self._is_held:
            self._is_held = False
            if not self._ended:
                self._hold(self.request_id, False)

    async def aclose(self) -> None:
        """Leave the stream: the engine frees everything at its next step."""
        self.cancel()

    async def __anext__(self) -> Delta:
        while not self._unread:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        merged = merge_deltas(self._unread)
        self._unread.clear()
        if self.detokenizer is None:
            return merged
        try:
            return _with_text(merged, self.detokenizer)
        except BaseException as cause:
            if not contained(cause):
                raise
            self.cancel()
            raise request_failed(self.request_id, cause) from cause


def _with_text(delta: Delta, detokenizer: Detokenizer) -> Delta:
    finished, tokens = delta.finished, delta.token_ids
    if finished is not None and finished.stop_token_id is not None:
        tokens = tokens[:-1]  # the token that stops is reported, but it is no text
    text = detokenizer.push_all(tokens)
    if finished is not None and finished.reason.is_whole:
        text += detokenizer.flush()
    return Delta(
        text=text, token_ids=delta.token_ids, logprobs=delta.logprobs, started=delta.started, finished=finished
    )


def merge_deltas(deltas: list[Delta]) -> Delta:
    """Several deltas of one request as one."""
    if len(deltas) == 1:
        return deltas[0]
    return Delta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        started=next((delta.started for delta in deltas if delta.started), None),
        finished=deltas[-1].finished,
    )
