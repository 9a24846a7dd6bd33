"""All adapters as rows, read now and then while somebody looks: a few at a time, so that nobody waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from gralora_runtime.adapters.catalogue.changes import any_name
from gralora_runtime.adapters.info import AdapterInfo
from gralora_runtime.observation.usage import Tally
from gralora_server.live.rates import Rates
from gralora_server.live.table import Row
from gralora_server.ports import Engine

FRESH_S = 5.0
AT_ONCE = 100  # described without a pause: a millisecond or two
PAUSE_S = 0.002

COLUMNS = (
    "name",
    "version",
    "state",
    "bytes",
    "in_flight",
    "tokens_per_s",
    "tokens",
    "requests",
    "last_used_s",
    "trouble",
)


class AdapterRoll:
    """Belongs to the page's loop."""

    def __init__(self) -> None:
        self._rows: Sequence[Row] = ()
        self._read_s = -FRESH_S
        self._rates = Rates()
        self._reading = asyncio.Lock()

    async def rows(self, engine: Engine) -> Sequence[Row]:
        """At most `FRESH_S` old."""
        async with self._reading:
            if time.monotonic() - self._read_s >= FRESH_S:
                self._rows = await self._read(engine)
                self._read_s = time.monotonic()
        return self._rows

    async def _read(self, engine: Engine) -> list[Row]:
        tallies = {account: tally for account, tally in engine.activity().adapters.items() if "+" not in account}
        rates = self._rates.look(
            {account: tally.generated_tokens for account, tally in tallies.items()}, time.monotonic()
        )
        rows: list[Row] = []
        after = ""
        while True:
            page = engine.adapters.page(size=AT_ONCE, after=after, prefix="", states=(), sees=any_name)
            rows += [_row(info, tallies, rates) for info in page.adapters]
            if not page.next_after:
                return rows
            after = page.next_after
            await asyncio.sleep(PAUSE_S)


def _row(info: AdapterInfo, tallies: Mapping[str, Tally], rates: Mapping[str, float]) -> Row:
    """Of adapters that have no account of their own the traffic is not known."""
    account = f"{info.name}@{info.version}"
    tally = tallies.get(account)
    return {
        "name": info.name,
        "version": info.version,
        "state": info.state.value,
        "pinned": info.pinned,
        "bytes": info.pool_bytes or None,
        "in_flight": info.in_flight,
        "tokens_per_s": rates.get(account),
        "tokens": tally.generated_tokens if tally else None,
        "requests": tally.requests if tally else None,
        "last_used_s": info.last_used_s or None,
        "trouble": info.error or "; ".join(info.warnings),
    }
