"""The client's side of the HTTP row, in a process of its own: `python -m benchmarks.http_client HOST:PORT`.

As `grpc_client`, over server-sent events. It reads them as they lie in the stream, as HTTP libraries for Python take
more time for an event than the server does, on the same cores.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

EVENT = b"data: "


async def main(address: str) -> None:
    """Until stdin ends."""
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        started_s = time.perf_counter()
        requests = json.loads(line)["requests"]
        answers = await asyncio.gather(*(_stream(address, request, started_s) for request in requests))
        print(json.dumps({"answers": answers}), flush=True)


async def _stream(address: str, request: dict[str, Any], started_s: float) -> dict[str, list[Any]]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(_question(request))
    tokens: list[int] = []
    times_s: list[float] = []
    while (line := await reader.readline()) != EVENT + b"[DONE]\n":
        if not line:
            raise ConnectionError("the stream ended early")
        if line.startswith(EVENT):
            new = json.loads(line[len(EVENT) :])["choices"][0]["token_ids"]
            tokens += new
            times_s += [time.perf_counter() - started_s] * len(new)
    writer.close()
    return {"tokens": tokens, "times_s": times_s}


def _question(request: dict[str, Any]) -> bytes:
    body = json.dumps(
        {
            "model": request["adapter"],
            "prompt": request["prompt"],
            "temperature": 0,
            "max_tokens": request["max_tokens"],
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
    )
    head = "POST /v1/completions HTTP/1.1\r\nhost: benchmark\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
