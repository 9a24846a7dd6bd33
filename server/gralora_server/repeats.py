"""A request that is sent again under the id that its client chose: it runs once, and all who sent it get the answer.

Whoever comes while it runs, or shortly after it ended, gets what was answered from its beginning; whoever of them needs
the next piece first fetches it for all. When all have left before its end it is cancelled, and sent again it runs anew.
Knows no wire: answers are streams of deltas, and what is the same request is said by a digest.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from gralora_runtime.errors import GraloraError, InvalidRequestError
from gralora_runtime.request import Delta
from gralora_runtime.stream import merge_deltas
from gralora_server.tenants import caller
from gralora_server.validation import AnyGenerateRequest

WINDOW_S = 60.0  # in which an answer can be had again
MAX_ANSWERS = 10_000
MAX_BYTES = 64 << 20  # of all answers, by `_size_of`
MAX_ANSWER_BYTES = 1 << 20  # a longer one goes to those who are there, and is not kept
# For how long, and in how many tries, a request waits for the engine to let go of its forerunner, which was cancelled.
LETTING_GO_S = (0.01, 0.03, 0.1, 0.3, 1.0)


class Answer(Protocol):
    """What a request is answered with, or somebody's reading of that."""

    served_by: str

    def __aiter__(self) -> AsyncIterator[Delta]: ...
    async def __anext__(self) -> Delta: ...
    def hold(self) -> None: ...
    def go_on(self) -> None: ...


Run = Callable[[], AbstractAsyncContextManager[Answer]]  # of a request, from its submission until it is left


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asked for what, under which name."""

    tenant: str
    request_id: str
    digest: bytes = field(compare=False)


def asked_for(request: AnyGenerateRequest) -> Asked | None:
    """Before anything is filled in. None if the client chose no id."""
    if not request.request_id:
        return None
    content = request.SerializeToString(deterministic=True)
    return Asked(caller.current().tenant, request.request_id, hashlib.sha256(content).digest())


@dataclass(slots=True, eq=False)
class _Record:
    """One run of a request, and what it has answered."""

    asked: Asked
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # the engine has taken it, or not
    running: AbstractAsyncContextManager[Answer] | None = None  # until it has ended
    stream: Answer | None = None
    deltas: list[Delta] = field(default_factory=list)
    num_bytes: int = 0
    kept: bool = True  # others may join
    finished: bool = False
    error: GraloraError | None = None
    num_readers: int = 0
    left: bool = False  # by all of them, before it had ended
    fetching: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def ended(self) -> bool:
        return self.finished or self.error is not None

    async def end(self) -> None:
        """Leave the engine, with the error that ended it if one did."""
        running, self.running = self.running, None
        if running is not None:
            error = self.error
            with suppress(GraloraError):  # which its readers are told
                await running.__aexit__(type(error) if error else None, error, error.__traceback__ if error else None)


class Repeats:
    """The answers that can be had again. All of it belongs to the event loop."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._records: dict[Asked, _Record] = {}  # in order of arrival
        self._num_bytes = 0

    @asynccontextmanager
    async def answer(self, asked: Asked | None, run: Run) -> AsyncIterator[Answer]:
        """What `run` answers, or did. Raises what it does, and `InvalidRequestError` for another request under
        the id of one that runs.
        """
        if asked is None:
            async with run() as stream:
                yield stream
            return
        reading = await self._open(asked, run)
        try:
            yield reading
        finally:
            await reading.leave()

    async def _open(self, asked: Asked, run: Run) -> _Reading:
        while (record := self._records.get(asked)) is not None and not record.left:
            if record.asked.digest != asked.digest:
                if record.finished:
                    break  # the id is free again
                raise InvalidRequestError("request_id", asked.request_id, "a request of that id is already running")
            await record.settled.wait()
            if self._records.get(asked) is record and not record.left:
                return _Reading(self, record)
        return await self._begin(asked, run, follows=record is not None and record.left)

    async def _begin(self, asked: Asked, run: Run, *, follows: bool) -> _Reading:
        if asked in self._records:
            self._drop(self._records[asked])
        record = self._records[asked] = _Record(asked)
        try:
            record.running, record.stream = await _begun(run, LETTING_GO_S if follows else ())
            return _Reading(self, record)
        except BaseException:
            self._drop(record)
            raise
        finally:
            record.settled.set()

    def grown(self, record: _Record, delta: Delta) -> None:
        """It has answered more: what is too much is not kept."""
        num_bytes = _size_of(delta)
        record.num_bytes += num_bytes
        if not record.kept:
            return
        self._num_bytes += num_bytes
        if record.num_bytes > MAX_ANSWER_BYTES:
            self._drop(record)
        while self._num_bytes > MAX_BYTES or len(self._records) > MAX_ANSWERS:
            self._drop(next((r for r in self._records.values() if r.finished), next(iter(self._records.values()))))

    def over(self, record: _Record) -> None:
        """It has ended. Who asks again after an error, a deadline or an abort wants another try."""
        finished = record.deltas[-1].finished if record.finished else None
        if finished is not None and finished.reason.is_whole:
            asyncio.get_running_loop().call_later(self._window_s, self._drop, record)
        else:
            self._drop(record)

    def abandoned(self, record: _Record) -> None:
        """All its readers left before its end. The engine takes a moment to let go of it."""
        record.left = True
        asyncio.get_running_loop().call_later(sum(LETTING_GO_S), self._drop, record)

    def _drop(self, record: _Record) -> None:
        if record.kept and self._records.get(record.asked) is record:
            del self._records[record.asked]
            self._num_bytes -= record.num_bytes
        record.kept = False


class _Reading:
    """One client's way through an answer."""

    def __init__(self, repeats: Repeats, record: _Record) -> None:
        assert record.stream is not None
        self.served_by = record.stream.served_by
        self._repeats = repeats
        self._record = record
        self._stream = record.stream
        self._at = 0
        record.num_readers += 1
        self.go_on()  # whoever held it was alone, and is not any more

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        record = self._record
        while self._at == len(record.deltas):
            if record.error is not None:
                raise record.error
            if record.finished:
                raise StopAsyncIteration
            async with record.fetching:
                if self._at == len(record.deltas) and not record.ended:
                    await self._fetch()
        new = merge_deltas(record.deltas[self._at :])
        self._at = len(record.deltas)
        if not record.kept and record.num_readers == 1:
            record.deltas.clear()
            self._at = 0
        return new

    def hold(self) -> None:
        """This client takes nothing. While others do, the request goes on."""
        if self._record.num_readers == 1:
            self._stream.hold()

    def go_on(self) -> None:
        self._stream.go_on()

    async def leave(self) -> None:
        """The last one to do so ends the request, if it has not ended."""
        self._record.num_readers -= 1
        if self._record.num_readers:
            self.go_on()
        elif not self._record.ended:
            self._repeats.abandoned(self._record)
            await self._record.end()

    async def _fetch(self) -> None:
        """A reader that is cancelled here has taken nothing: the next one fetches it."""
        record = self._record
        try:
            delta = await anext(self._stream)
        except GraloraError as error:
            record.error = error
            self._repeats.over(record)
            await record.end()
            return
        record.deltas.append(delta)
        record.finished = delta.finished is not None
        self._repeats.grown(record, delta)
        if record.finished:
            self._repeats.over(record)
            await record.end()


async def _begun(run: Run, pauses_s: Sequence[float]) -> tuple[AbstractAsyncContextManager[Answer], Answer]:
    """Tried again after each pause while the id is in use."""
    for pause_s in pauses_s:
        running = run()
        try:
            return running, await running.__aenter__()
        except InvalidRequestError as error:
            if error.field != "request_id":
                raise
        await asyncio.sleep(pause_s)
    running = run()
    return running, await running.__aenter__()


def _size_of(delta: Delta) -> int:
    """About, in bytes of memory."""
    num_top = sum(1 + len(logprob.top) for logprob in delta.logprobs)
    return 400 + len(delta.text) + 40 * len(delta.token_ids) + 120 * num_top
