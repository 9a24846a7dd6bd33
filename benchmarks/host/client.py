"""Streaming clients in a process of their own: `python -m benchmarks.host.client HOST:PORT`.

Each line on stdin asks for streams, all at once; the answer says of each which tokens came, and of each message when
(by the machine's monotonic clock) and how many tokens it had.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import uvloop

from gralora_server.client import AsyncClient


async def main(address: str) -> None:
    """Until stdin ends."""
    loop = asyncio.get_running_loop()
    async with AsyncClient(address) as client:
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            asked = json.loads(line)["streams"]
            print(json.dumps({"streams": await asyncio.gather(*(_stream(client, one) for one in asked))}), flush=True)


async def _stream(client: AsyncClient, asked: dict[str, Any]) -> dict[str, list[Any]]:
    tokens: list[int] = []
    counts: list[int] = []
    times_s: list[float] = []
    stream = client.stream(temperature=0.0, ignore_eos=True, **asked)
    async for delta in stream:
        tokens += delta.token_ids
        counts.append(len(delta.token_ids))
        times_s.append(time.perf_counter())
    return {"tokens": tokens, "counts": counts, "times_s": times_s}


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
