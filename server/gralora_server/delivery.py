"""One request's deltas on their way to its client: merged, written in bounded time.

Knows neither the engine nor a wire: errors leave as exceptions, and whoever opened the stream closes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Self

from gralora_runtime.request import Delta
from gralora_runtime.stream import merge_deltas
from gralora_server.errors import StalledClientError

# Of one write: then its request stops being computed until the client has read on.
HOLD_AFTER_S = 1.0

Write = Callable[[Delta], Awaitable[None]]  # raises CancelledError when there is nobody to write to


def _nothing() -> None:
    pass


async def merged(deltas: AsyncIterator[Delta], *, min_tokens: int) -> AsyncIterator[Delta]:
    """Join deltas until they hold `min_tokens` tokens. The first and the last never wait."""
    pending: list[Delta] = []
    num_tokens = 0
    async for delta in deltas:
        pending.append(delta)
        num_tokens += len(delta.token_ids)
        if num_tokens >= min_tokens or delta.started is not None or delta.finished is not None:
            yield merge_deltas(pending)
            pending, num_tokens = [], 0


async def deliver(
    deltas: AsyncIterator[Delta],
    write: Write,
    *,
    request_id: str,
    min_tokens: int,
    write_timeout_s: float,
    hold_after_s: float = HOLD_AFTER_S,
    on_slow: Callable[[], None] = _nothing,
    on_read: Callable[[], None] = _nothing,
) -> None:
    """Write the whole generation. Raises `StalledClientError` when a write is not taken in time, and what `write` does.

    `on_slow` is called when a write takes longer than `hold_after_s`, and `on_read` after every one that was taken.
    """
    try:
        async with WriteLimit(write_timeout_s, min(hold_after_s, write_timeout_s), on_slow) as limit:
            async for delta in merged(deltas, min_tokens=min_tokens):
                limit.begin()
                await write(delta)
                limit.end()
                on_read()
    except TimeoutError as cause:
        raise StalledClientError(request_id, write_timeout_s) from cause


class WriteLimit:
    """Raises `TimeoutError` when one write takes too long, and calls `on_slow` when it takes rather long. A timer for
    each would be a fifth of what a message costs: here one looks in now and then, as soon as a write can have taken
    that long.
    """

    def __init__(self, limit_s: float, slow_s: float, on_slow: Callable[[], None]) -> None:
        self._limit_s = limit_s
        self._slow_s = slow_s
        self._on_slow = on_slow
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._writing_since_s: float | None = None

    def begin(self) -> None:
        """A write is about to be awaited."""
        self._writing_since_s = self._loop.time()

    def end(self) -> None:
        """It was taken."""
        self._writing_since_s = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._timer = self._loop.call_later(self._slow_s, self._look)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._timeout.__aexit__(kind, error, traceback)

    def _look(self) -> None:
        now_s = self._loop.time()
        took_s = 0.0 if self._writing_since_s is None else now_s - self._writing_since_s
        if took_s >= self._limit_s:
            self._timeout.reschedule(now_s)
            return
        if took_s >= self._slow_s:
            self._on_slow()
            left_s = self._limit_s - took_s
        else:
            left_s = self._slow_s - took_s
        self._timer = self._loop.call_later(left_s, self._look)


async def collect(deltas: AsyncIterator[Delta]) -> Delta:
    """The whole generation at once."""
    return merge_deltas([delta async for delta in deltas])
