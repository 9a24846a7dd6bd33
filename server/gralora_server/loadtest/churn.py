"""Adapters that come and go while others are served: unload one, load it again, and note how long it took."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from gralora_server.client import AsyncClient, GraloraClientError
from gralora_server.loadtest.result import ChurnStats
from gralora_server.loadtest.summary import Distribution


@dataclass(slots=True, kw_only=True)
class Churn:
    """`per_s` adapters a second, drawn from `names`. Requests for one that is just gone get what the server says."""

    names: Sequence[str]
    per_s: float
    seed: int
    _loads_s: list[float] = field(default_factory=list)
    _unloads: int = 0
    _failures: Counter[str] = field(default_factory=Counter)

    async def run(self, client: AsyncClient) -> None:
        """Until it is cancelled."""
        chosen = random.Random(self.seed)  # noqa: S311
        sources = {adapter.name: adapter.source for adapter in await client.adapters.list()}
        while True:
            await asyncio.sleep(1 / self.per_s)
            name = chosen.choice(self.names)
            await self._reload(client, name, sources.get(name))

    async def _reload(self, client: AsyncClient, name: str, source: str | None) -> None:
        started_s = time.monotonic()
        try:
            await client.adapters.unload(name)
            self._unloads += 1
            await client.adapters.load(name, source)
            self._loads_s.append(time.monotonic() - started_s)
        except GraloraClientError as error:
            self._failures[error.reason or type(error).__name__] += 1

    def stats(self) -> ChurnStats:
        return ChurnStats(unloads=self._unloads, reload_s=Distribution.of(self._loads_s), failures=dict(self._failures))
