"""Many clients at the same moment: each is served or told why not."""

from __future__ import annotations

import asyncio
from collections import Counter

import grpc
from support.fake_engine import FakeEngine, finished, token
from support.grpc_harness import ask, served

from gralora_runtime.errors import QueueFullError
from gralora_runtime.request import GenerationRequest
from gralora_runtime.stream import RequestStream

NUM_STREAMS = 1500
ROOM = 64


class SmallEngine(FakeEngine):
    """Takes the first `ROOM` requests."""

    async def submit(self, request: GenerationRequest) -> RequestStream:
        if len(self.streams) >= ROOM:
            raise QueueFullError(ROOM, retry_after_s=1.0)
        return await super().submit(request)


async def outcome(call: grpc.aio.UnaryStreamCall) -> grpc.StatusCode:
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_every_one_of_many_streams_at_once_is_served_or_refused_with_a_status_of_ours() -> None:
    """gRPC itself once ended some of them as CANCELLED, before anything of ours had seen them."""
    engine = SmallEngine()
    engine.script = [token(1), finished(output_tokens=1)]
    async with served(engine=engine) as s:
        calls = [s.client.generation.StreamGenerate(ask(f"r{index}")) for index in range(NUM_STREAMS)]
        outcomes = Counter(await asyncio.gather(*map(outcome, calls)))

    refused = NUM_STREAMS - ROOM
    assert outcomes == {grpc.StatusCode.OK: ROOM, grpc.StatusCode.RESOURCE_EXHAUSTED: refused}
