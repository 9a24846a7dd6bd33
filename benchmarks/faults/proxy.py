"""A TCP proxy that can stop forwarding without closing anything: to either side the other one has vanished."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

PIECE_BYTES = 64 << 10


@dataclass(slots=True)
class Proxy:
    """Made by `between`."""

    target: str
    address: str = ""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def freeze(self) -> None:
        """Of what either side sends from now on, nothing is read; connections stay open."""
        for task in self._tasks:
            task.cancel()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        onward_reader, onward_writer = await asyncio.open_connection(host, int(port), limit=PIECE_BYTES)
        self._writers += [writer, onward_writer]
        for source, sink in ((reader, onward_writer), (onward_reader, writer)):
            task = asyncio.create_task(_forward(source, sink))
            self._tasks.add(task)

    def close(self) -> None:
        self.freeze()
        for writer in self._writers:
            writer.close()


@asynccontextmanager
async def between(target: str) -> AsyncIterator[Proxy]:
    """For as long as the block lasts; then all its connections are closed."""
    proxy = Proxy(target)
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0, limit=PIECE_BYTES)
    host, port = server.sockets[0].getsockname()
    proxy.address = f"{host}:{port}"
    try:
        yield proxy
    finally:
        server.close()
        proxy.close()


async def _forward(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while piece := await source.read(PIECE_BYTES):
            sink.write(piece)
            await sink.drain()
        sink.write_eof()
