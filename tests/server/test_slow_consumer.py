"""A client that stops reading is ended and slows nobody.

The stock client exerts backpressure once its flow-control window is full, which needs messages of some size.
"""

from __future__ import annotations

import asyncio

import grpc
from support.fake_engine import finished, token
from support.grpc_harness import Served, ask, ask_once, failure, read_all, served

from gralora_runtime.errors import SlowConsumerError

SMALL_WINDOW = (("grpc.http2.bdp_probe", 0),)
KILOBYTES_64 = "x" * (64 << 10)


class Flood:
    """Generates as fast as the server takes it, until the request ends or `stop`."""

    def __init__(self, s: Served, request_id: str) -> None:
        self.num_chars = 0
        self._stream = s.engine.streams[request_id]
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while not self._stream._ended:
            if not self._stream._unread:
                self._stream.put(token(1, KILOBYTES_64))
                self.num_chars += len(KILOBYTES_64)
            await asyncio.sleep(0)

    async def stalled(self) -> None:
        """Returns when nothing moves any more; too early on a starved machine, which weakens a test but fails none."""
        seen = -1
        while seen != self.num_chars:
            seen = self.num_chars
            await asyncio.sleep(0.2)

    def stop(self) -> None:
        self._task.cancel()


async def test_a_client_that_stops_reading_is_ended() -> None:
    async with served(write_timeout_s=0.2, channel_options=SMALL_WINDOW) as s:
        call = s.client.generation.StreamGenerate(ask())
        await call.read()
        Flood(s, "r1")
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)
        failed = await failure(read_all(call))

    assert s.engine.aborted == ["r1"]
    assert failed.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failed.message == "request 'r1': the client read nothing for 0.2 s"
    assert failed.info.reason == "SLOW_CONSUMER"


async def test_a_client_that_stops_reading_slows_nobody() -> None:
    async with served(write_timeout_s=3600, channel_options=SMALL_WINDOW) as s:
        stalled = s.client.generation.StreamGenerate(ask())
        await stalled.read()
        await Flood(s, "r1").stalled()
        s.engine.script = [token(1), finished()]
        others = [s.client.generation.Generate(ask_once(f"other-{index}")) for index in range(8)]
        answers = await asyncio.gather(*others)
        stalled.cancel()
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)

    assert all(answer.HasField("finished") for answer in answers)
    assert s.engine.aborted == ["r1"]


async def test_a_stalled_client_that_reads_on_in_time_loses_nothing() -> None:
    async with served(write_timeout_s=10, channel_options=SMALL_WINDOW) as s:
        call = s.client.generation.StreamGenerate(ask())
        await call.read()
        flood = Flood(s, "r1")
        await flood.stalled()
        flood.stop()
        s.engine.streams["r1"].put(finished())
        messages = await read_all(call)

    assert messages[-1].HasField("finished")
    assert sum(len(message.text) for message in messages) == flood.num_chars


async def test_the_engines_own_limit_ends_the_stream_with_the_same_status() -> None:
    async with served() as s:
        call = s.client.generation.StreamGenerate(ask())
        await call.read()
        s.engine.streams["r1"].fail(SlowConsumerError("r1", 1025))
        failed = await failure(read_all(call))

    assert failed.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failed.info.reason == "SLOW_CONSUMER"


async def test_a_client_that_vanishes_while_stalled_leaves_nothing_behind() -> None:
    """Its connection closes while a write is pending: the write fails, and the request is closed all the same."""
    async with served(write_timeout_s=3600) as s:
        target = f"127.0.0.1:{s.port}"
        options = (("grpc.use_local_subchannel_pool", 1), *SMALL_WINDOW)
        async with grpc.aio.insecure_channel(target, options=options) as channel:
            method = "/gralora.v1.GenerationService/StreamGenerate"
            call = channel.unary_stream(method)(ask().SerializeToString())
            await call.read()
            await Flood(s, "r1").stalled()
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)
        assert await s.server.gate.wait_empty(10)

    assert s.engine.aborted == ["r1"]
