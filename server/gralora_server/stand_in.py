"""What answers while there is no server: one that never opens, on the ports of the one that is awaited."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

from gralora_runtime.errors import GraloraError
from gralora_server.config import ServerConfig
from gralora_server.service import GrpcServer, serving_http
from gralora_server.settings.reloader import Reloader


class StandIn:
    """By gRPC, and by HTTP where that is wanted."""

    def __init__(self, config: ServerConfig, reloader: Reloader | None, absent: Callable[[], GraloraError]) -> None:
        """`absent`: see `Gate`. Raises ConfigError."""
        self._config = config
        self._server = GrpcServer(config, reloader, absent)
        self._ports = AsyncExitStack()

    async def start(self) -> None:
        """Raises ConfigError; nothing listens then."""
        async with AsyncExitStack() as ports:
            await self._server.start()
            ports.push_async_callback(self._server.stop)
            await ports.enter_async_context(serving_http(self._config, self._server))
            self._ports = ports.pop_all()

    async def stop(self) -> None:
        await self._ports.aclose()
