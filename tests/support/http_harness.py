"""A real server with its HTTP port, in front of a fake engine, and a client of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
from support.fake_engine import FakeEngine
from support.grpc_harness import Served, served

from gralora_server.config import HttpConfig, ServerConfig
from gralora_server.service import GrpcServer, serving_http

HTTP = HttpConfig(host="127.0.0.1", port=0)
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": "fake", "prompt": "hello"}


@dataclass(frozen=True, slots=True)
class HttpServed:
    """`grpc` is the same server's other port."""

    grpc: Served
    client: httpx2.AsyncClient
    port: int

    @property
    def engine(self) -> FakeEngine:
        return self.grpc.engine

    @property
    def server(self) -> GrpcServer:
        return self.grpc.server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def http_served(**settings: Any) -> AsyncIterator[HttpServed]:
    """`settings`: of `served`."""
    started = settings.pop("started", True)
    engine = settings.pop("engine", None)
    async with served(started=started, engine=engine, http=HTTP, **settings) as grpc:
        config = ServerConfig(port=0, http=HTTP, **settings)
        async with serving_http(config, grpc.server) as port:
            assert port is not None
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
                yield HttpServed(grpc, client, port)


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """What a refusal says; anything else fails the test."""
    assert response.status_code >= 400, response.text
    found: dict[str, Any] = response.json()["error"]
    return found


async def events(response: httpx2.Response) -> list[Any]:
    """All events of a stream, and "[DONE]"."""
    found: list[Any] = []
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def text_of(pieces: list[Any], index: int = 0) -> str:
    """A choice's whole text, of a chat or a completion."""
    choices = [
        one for piece in pieces if piece != "[DONE]" for one in piece.get("choices", ()) if one["index"] == index
    ]
    return "".join(one["text"] if "text" in one else one["delta"].get("content", "") for one in choices)
