"""A server with known delays, to test a load generator against: gralora.v1 on asyncio, with no model behind it.

A request's adapter says how it is answered: `ttft=0.2,itl=0.01` sends the first token after 0.2 s and each further one
10 ms after the last was due. `fail=NAME` ends with that gRPC status, `lose=2` leaves out the last two tokens.
`refuse=3,retry=0.5` refuses each prompt three times, as a full server does, and says when to come again. Every message
is noted when it leaves.

`python -m benchmarks.fake_server ADAPTER...` lists those adapters, prints its address and serves until stdin ends.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health_pb2_grpc

from gralora.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc, server_pb2, server_pb2_grpc
from gralora_runtime.errors import QueueFullError
from gralora_server.health import Health
from gralora_server.status import failure_of

VOCAB_SIZE = 49152


class FakeServer(
    generation_pb2_grpc.GenerationServiceServicer,
    server_pb2_grpc.ServerServiceServicer,
    adapters_pb2_grpc.AdapterServiceServicer,
):
    """`sent_s`: for each request, when it came and when each of its messages left, by the monotonic clock."""

    def __init__(self, adapters: tuple[str, ...] = ()) -> None:
        self.adapters = list(adapters)
        self.sent_s: list[tuple[float, list[float]]] = []
        self.running = self.most_running = 0
        self.prompts: list[tuple[int, ...]] = []
        self.refused: Counter[tuple[int, ...]] = Counter()  # by prompt
        self.tokens: list[str] = []  # whose each request was
        self.timeouts_s: list[float | None] = []
        self.unloaded: list[str] = []

    async def start(self) -> tuple[grpc.aio.Server, int]:
        """On a free port of loopback."""
        server = grpc.aio.server()
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(self, server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self, server)
        health = Health(())
        await health.set_serving(True)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        came_s, left_s = time.monotonic(), list[float]()
        self.sent_s.append((came_s, left_s))
        self.prompts.append(tuple(request.token_ids.ids))
        self.tokens.append(dict(context.invocation_metadata()).get("authorization", ""))
        self.timeouts_s.append(context.time_remaining())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        options = dict(part.split("=") for part in request.adapter.split(",") if "=" in part)
        try:
            if "fail" in options:
                await context.abort(grpc.StatusCode[options["fail"]], "as asked")
            if self.refused[self.prompts[-1]] < int(options.get("refuse", 0)):
                self.refused[self.prompts[-1]] += 1
                failure = failure_of(QueueFullError("as asked", float(options["retry"])))
                await context.abort(failure.code, failure.message, failure.trailers)
            due_s = came_s + float(options.get("ttft", 0))
            for number in range(request.stopping.max_tokens - int(options.get("lose", 0))):
                if (pause_s := due_s - time.monotonic()) > 0:
                    await asyncio.sleep(pause_s)
                left_s.append(time.monotonic())
                yield message(first=number == 0)
                due_s += float(options.get("itl", 0))
        finally:
            self.running -= 1

    async def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        return server_pb2.GetServerInfoResponse(vocab_size=VOCAB_SIZE)

    async def ListAdapters(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        adapters = [adapters_pb2.Adapter(name=name, state=adapters_pb2.ADAPTER_STATE_HOST) for name in self.adapters]
        return adapters_pb2.ListAdaptersResponse(adapters=adapters)

    async def UnloadAdapter(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        self.unloaded.append(request.name)
        return adapters_pb2.UnloadAdapterResponse(name=request.name)

    async def LoadAdapter(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        adapter = adapters_pb2.Adapter(name=request.name, state=adapters_pb2.ADAPTER_STATE_HOST)
        return adapters_pb2.LoadAdapterResponse(adapter=adapter)


def message(*, first: bool) -> Any:
    """One token."""
    answer = generation_pb2.StreamGenerateResponse(token_ids=[7], text="x")
    if first:
        answer.started.queue_time_s = 0.125
    return answer


async def main() -> None:
    """Until stdin ends."""
    server, port = await FakeServer(tuple(sys.argv[1:])).start()  # type: ignore[abstract]  # other RPCs answer UNIMPLEMENTED
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(main())
