"""The client's side of the gRPC row, in a process of its own: `python -m benchmarks.grpc_client HOST:PORT`.

Reads requests from stdin, one run a line, streams all of a run at once, and writes what came and when.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from gralora_server.client import AsyncClient


async def main(address: str) -> None:
    """Until stdin ends."""
    loop = asyncio.get_running_loop()
    async with AsyncClient(address) as client:
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            started_s = time.perf_counter()
            requests = json.loads(line)["requests"]
            answers = await asyncio.gather(*(_stream(client, request, started_s) for request in requests))
            print(json.dumps({"answers": answers}), flush=True)


async def _stream(client: AsyncClient, request: dict[str, Any], started_s: float) -> dict[str, list[Any]]:
    tokens: list[int] = []
    times_s: list[float] = []
    stream = client.stream(
        token_ids=request["prompt"],
        adapter=request["adapter"],
        temperature=0.0,
        max_tokens=request["max_tokens"],
        ignore_eos=True,
    )
    async for delta in stream:
        tokens += delta.token_ids
        times_s += [time.perf_counter() - started_s] * len(delta.token_ids)
    return {"tokens": tokens, "times_s": times_s}


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
