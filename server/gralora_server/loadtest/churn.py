"""Adapters that come and go while others are served: unload one, load it again, and note how long it took."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from gralora_runtime.errors import ConfigError
from gralora_server.client import Adapter, AsyncClient, GraloraClientError
from gralora_server.loadtest.result import ChurnStats
from gralora_server.loadtest.summary import Distribution
from gralora_server.uninterrupted import uninterrupted


@dataclass(slots=True, kw_only=True)
class Churn:
    """`per_s` adapters a second, drawn from `names`. Requests for one that is just gone get what the server says."""

    names: Sequence[str]
    per_s: float
    seed: int
    _loads_s: list[float] = field(default_factory=list)
    _unloads: int = 0
    _failures: Counter[str] = field(default_factory=Counter)

    @asynccontextmanager
    async def running(self, client: AsyncClient) -> AsyncIterator[None]:
        """For as long as the block lasts. What was unloaded is loaded again before it ends.

        Raises a GraloraClientError if the adapters cannot be listed, ConfigError if the server has none of them.
        """
        adapters = [adapter for adapter in await client.adapters.list() if adapter.name in self.names]
        if not adapters:
            raise ConfigError(f"the server has none of the adapters that should come and go: {', '.join(self.names)}")
        reloading = asyncio.create_task(self._run(client, adapters))
        try:
            yield
        finally:
            reloading.cancel()
            with suppress(asyncio.CancelledError):
                await reloading

    async def _run(self, client: AsyncClient, adapters: Sequence[Adapter]) -> None:
        chosen = random.Random(self.seed)  # noqa: S311
        while True:
            await asyncio.sleep(1 / self.per_s)
            await uninterrupted(self._reload(client, chosen.choice(adapters)))

    async def _reload(self, client: AsyncClient, adapter: Adapter) -> None:
        started_s = time.monotonic()
        try:
            await client.adapters.unload(adapter.name)
            self._unloads += 1
            await client.adapters.load(adapter.name, adapter.source, pin=adapter.pinned)
            self._loads_s.append(time.monotonic() - started_s)
        except GraloraClientError as error:
            self._failures[error.reason or type(error).__name__] += 1

    def stats(self) -> ChurnStats:
        return ChurnStats(unloads=self._unloads, reload_s=Distribution.of(self._loads_s), failures=dict(self._failures))
