"""Sends a trace to a server and notes what comes back when. One process, one event loop, several connections.

Open loop: a request is sent when it is due, whether or not those before it are answered, and its delays count from when
it was due. A ticker measures how late this loop wakes up: a generator that is late measures itself.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from gralora.v1 import generation_pb2
from gralora_server.client.aio import open_channel
from gralora_server.client.connection import Connection
from gralora_server.client.errors import client_error
from gralora_server.client.requests import Stubs, generate_fields
from gralora_server.loadtest.patience import Patience
from gralora_server.loadtest.record import OK, RequestRecord, Try
from gralora_server.loadtest.trace import Trace, TraceRequest

TICK_S = 0.02
SAMPLE_S = 1.0
START_DELAY_S = 0.2
UNFINISHED = "UNFINISHED"  # still running when the time to drain was over


@dataclass(slots=True)
class Progress:
    """Counts as they stand, for whoever shows them."""

    at_s: float = 0.0
    sent: int = 0
    ended: int = 0
    failed: int = 0
    tokens: int = 0
    memory_bytes: int | None = None  # of the server, in samples

    @property
    def in_flight(self) -> int:
        return self.sent - self.ended


@dataclass(frozen=True, slots=True)
class DriverResult:
    """Of one run. `samples`: the counts at the end of each second."""

    records: list[RequestRecord]
    samples: list[Progress]
    wake_lags_s: list[float]  # how late the loop woke up, many times a second
    cpu_share: float  # of one core, by this process, between warm-up and end


@dataclass(slots=True)
class Driver:
    """Drives one server, once. `on_progress` is called about twice a second."""

    connection: Connection
    vocab_size: int
    drain_s: float = 60.0  # after the trace's end, what still runs is given so long
    connections: int = 4
    on_progress: Callable[[Progress], None] = lambda _: None
    patience: Patience = field(default_factory=Patience)
    tokens: Mapping[str, str] = field(default_factory=dict)  # by tenant; who has none here has the connection's
    memory_bytes: Callable[[], int | None] = lambda: None  # of the server
    _progress: Progress = field(default_factory=Progress)
    _records: list[RequestRecord] = field(default_factory=list)
    _run: str = field(default_factory=lambda: secrets.token_hex(8))
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    start_s: float = 0.0  # by the monotonic clock: all times of records count from it

    async def run(self, trace: Trace) -> DriverResult:
        """Returns when every request has ended. A request that fails is a record; only a bug here raises."""
        channels = [self._channel() for _ in range(self.connections)]
        stubs = itertools.cycle([Stubs(channel) for channel in channels])
        # Drawing prompts must not delay requests that are due.
        messages = [self._message(request) for request in trace.requests] if trace.concurrency is None else []
        self.start_s = time.monotonic() + START_DELAY_S
        watch = _Watch(self, trace.warmup_s)
        watching = asyncio.create_task(watch.run())
        try:
            if trace.concurrency is None:
                await self._open_loop(trace, messages, stubs)
            else:
                await self._closed_loop(trace, trace.concurrency, stubs)
            cpu_share = watch.cpu_share()
        finally:
            watching.cancel()
            await asyncio.gather(*(channel.close(None) for channel in channels))
        return DriverResult(self._records, [*watch.samples, self.progress()], watch.lags_s, cpu_share)

    def now_s(self) -> float:
        return time.monotonic() - self.start_s

    def progress(self) -> Progress:
        counts = self._progress
        return Progress(self.now_s(), counts.sent, counts.ended, counts.failed, counts.tokens)

    async def _open_loop(self, trace: Trace, messages: list[Any], stubs: Iterator[Stubs]) -> None:
        tasks = []
        for request, message in zip(trace.requests, messages, strict=True):
            # Without a pause between requests that are due, none of the answers would be read.
            await asyncio.sleep(max(0.0, request.arrival_s - self.now_s()))
            counted = request.arrival_s >= trace.warmup_s
            one = self._one(next(stubs), request, message, request.arrival_s, counted=counted)
            tasks.append(asyncio.create_task(one))
        await self._drain(trace, tasks)

    async def _closed_loop(self, trace: Trace, concurrency: int, stubs: Iterator[Stubs]) -> None:
        await asyncio.sleep(max(0.0, -self.now_s()))
        queue = _endless(trace.requests)

        async def client() -> None:
            for request in queue:
                due_s = self.now_s()
                if due_s >= trace.duration_s:
                    return
                message = self._message(request)
                counted = due_s >= trace.warmup_s
                await self._one(next(stubs), request, message, due_s, counted=counted)

        await self._drain(trace, [asyncio.create_task(client()) for _ in range(concurrency)])

    async def _drain(self, trace: Trace, tasks: list[asyncio.Task[None]]) -> None:
        if not tasks:
            return
        timeout_s = max(0.0, trace.duration_s - self.now_s()) + self.drain_s
        _, late = await asyncio.wait(tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks)

    async def _one(self, stubs: Stubs, request: TraceRequest, message: Any, due_s: float, *, counted: bool) -> None:
        came = _Came()
        self._progress.sent += 1
        tries = [await self._try(stubs, request, message, came)]
        with suppress(asyncio.CancelledError):  # the run is over: what the last try said stands
            while (again_s := self.patience.again_s(tries, due_s)) is not None:
                await asyncio.sleep(again_s - self.now_s())
                tries.append(await self._try(stubs, request, message, came))
        self._progress.ended += 1
        self._progress.failed += tries[-1].status != OK
        self._records.append(
            RequestRecord(
                adapter=request.adapter,
                intended_s=due_s,
                sent_s=tries[0].sent_s,
                token_times_s=tuple(came.times_s),
                finished_s=tries[-1].ended_s,
                status=tries[-1].status,
                counted=counted,
                queue_s=came.queue_s,
                tenant=request.tenant,
                prompt_tokens=request.prompt_tokens,
                tries=tuple(tries),
            )
        )

    async def _try(self, stubs: Stubs, request: TraceRequest, message: Any, came: _Came) -> Try:
        status, reason, retry_s = OK, "", None
        sent_s = self.now_s()
        call = stubs.generation.StreamGenerate(
            message, metadata=self._metadata(request.tenant), timeout=self.patience.deadline_s
        )
        try:
            async for answer in call:
                now_s = self.now_s()
                if answer.HasField("started"):
                    came.queue_s = answer.started.queue_time_s
                count = len(answer.token_ids)
                came.times_s += [now_s] * count
                self._progress.tokens += count
            if len(came.times_s) != request.output_tokens:
                status = "WRONG_LENGTH"  # the end of sequence is ignored: a server that says less has lost something
        except grpc.aio.AioRpcError as error:
            failure = client_error(error)
            status, reason = error.code().name, failure.reason
            retry_s = None if came.times_s else failure.retry_after_s
        except asyncio.CancelledError:
            call.cancel()
            status = UNFINISHED
        return Try(sent_s=sent_s, ended_s=self.now_s(), status=status, reason=reason, retry_s=retry_s)

    def _metadata(self, tenant: str) -> tuple[tuple[str, str], ...]:
        token = self.tokens.get(tenant, self.connection.token)
        return replace(self.connection, token=token).call_metadata()

    def _message(self, request: TraceRequest) -> generation_pb2.StreamGenerateRequest:
        options: Any = {"adapter": request.adapter, "temperature": 0.0, "ignore_eos": True}
        options["max_tokens"] = request.output_tokens
        if self.patience.retries:  # by which a server knows who comes again
            options["request_id"] = f"{self._run}-{next(self._numbers)}"
        ids = request.prompt_ids(self.vocab_size)
        return generation_pb2.StreamGenerateRequest(**generate_fields(None, ids, None, options))

    def _channel(self) -> grpc.aio.Channel:
        # Channels of one process to one server share a connection unless they are told not to.
        options = [*self.connection.channel_options(), ("grpc.use_local_subchannel_pool", 1)]
        return open_channel(self.connection.target, self.connection.credentials(), options)


def _endless(requests: Sequence[TraceRequest]) -> Iterator[TraceRequest]:
    """Again and again, each time with other prompts, which no prefix cache has: a fast server does not run out."""
    for lap in itertools.count():
        yield from (replace(request, seed=request.seed + lap) for request in requests)


@dataclass(slots=True)
class _Came:
    """What a request has been answered so far."""

    times_s: list[float] = field(default_factory=list)  # of tokens
    queue_s: float = 0.0


class _Watch:
    """Samples the counts each second, and this process's own health many times a second."""

    def __init__(self, driver: Driver, warmup_s: float) -> None:
        self._driver = driver
        self._warmup_s = warmup_s
        self._cpu_from: tuple[float, float] | None = None
        self.samples: list[Progress] = []
        self.lags_s: list[float] = []

    async def run(self) -> None:
        next_sample_s, next_report_s = SAMPLE_S, 0.0
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(TICK_S)
            progress = self._driver.progress()
            if progress.at_s >= self._warmup_s:
                self.lags_s.append(time.monotonic() - before_s - TICK_S)
                self._cpu_from = self._cpu_from or (time.monotonic(), time.process_time())
            if progress.at_s >= next_sample_s:
                progress.memory_bytes = self._driver.memory_bytes()
                self.samples.append(progress)
                next_sample_s += SAMPLE_S
            if progress.at_s >= next_report_s:
                self._driver.on_progress(progress)
                next_report_s = progress.at_s + 0.5

    def cpu_share(self) -> float:
        """Since the warm-up; gRPC's own threads count, so it can be above 1."""
        if self._cpu_from is None:
            return 0.0
        since_s, cpu_s = self._cpu_from
        return (time.process_time() - cpu_s) / max(time.monotonic() - since_s, TICK_S)
