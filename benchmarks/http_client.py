"""The client's side of a row over HTTP, in a process of its own: `python -m benchmarks.http_client HOST:PORT SERVER`.

As `grpc_client`, over server-sent events. It reads them as they lie in the stream, as HTTP libraries for Python take
more time for an event than the server does, on the same cores. SERVER says whose API it is: two servers tell tokens in
different ways.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

EVENT = b"data: "


@dataclass(slots=True)
class Heard:
    """Of one answer, so far."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)  # of each token

    def of_ours(self, event: Mapping[str, Any], now_s: float) -> None:
        (choice,) = event["choices"]
        self.text += choice["text"]
        self.tokens += choice["token_ids"]
        self.times_s += [now_s] * len(choice["token_ids"])

    def of_dynamos(self, event: Mapping[str, Any], now_s: float) -> None:
        """It tells with each piece how many tokens there are by then, and never which."""
        self.text += "".join(choice["text"] for choice in event["choices"])
        self.times_s += [now_s] * (event["usage"]["completion_tokens"] - len(self.times_s))


@dataclass(frozen=True, slots=True)
class Api:
    """`extras` of a request ask for tokens; `hear` takes what an event has."""

    extras: Mapping[str, Any]
    hear: Callable[[Heard, Mapping[str, Any], float], None]


APIS = {
    "ours": Api({"return_token_ids": True}, Heard.of_ours),
    "dynamo": Api({"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, Heard.of_dynamos),
}


async def main(address: str, server: str) -> None:
    """Until stdin ends."""
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        started_s = time.perf_counter()
        requests = json.loads(line)["requests"]
        answers = await asyncio.gather(*(_stream(address, APIS[server], request, started_s) for request in requests))
        print(json.dumps({"answers": answers}), flush=True)


async def _stream(address: str, api: Api, request: dict[str, Any], started_s: float) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(_question(request, api.extras))
    heard = Heard()
    while (line := await reader.readline()) != EVENT + b"[DONE]\n":
        if not line:
            raise ConnectionError("the stream ended early")
        if line.startswith(EVENT):
            api.hear(heard, json.loads(line[len(EVENT) :]), time.perf_counter() - started_s)
    writer.close()
    return asdict(heard)


def _question(request: dict[str, Any], extras: Mapping[str, Any]) -> bytes:
    asked = {
        "model": request["adapter"],
        "prompt": request["prompt"],
        "temperature": 0,
        "max_tokens": request["max_tokens"],
        "ignore_eos": True,
        "stream": True,
    }
    body = json.dumps(asked | dict(extras))
    head = "POST /v1/completions HTTP/1.1\r\nhost: benchmark\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
