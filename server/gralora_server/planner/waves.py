"""Waves: requests that are sent to an idle server at once, and how long its steps took by what came back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from gralora_runtime.errors import ConfigError
from gralora_server.client.connection import Connection
from gralora_server.loadtest.driver import Driver
from gralora_server.loadtest.record import RequestRecord
from gralora_server.loadtest.trace import Trace, TraceRequest
from gralora_server.planner.points import SHORT

LONGER = (1, 4, 16)  # times as long, where the first request has ended before the last one has come


@dataclass(slots=True)
class Waves:
    """To one server. Every prompt is another one."""

    connection: Connection
    vocab_size: int
    max_model_len: int
    _seeds: itertools.count[int] = field(default_factory=itertools.count)

    async def step_s(self, adapters: Sequence[str], output: int, prompt: int = SHORT) -> float:
        """The mean step in which one request of each of these adapters decodes.

        Not the median: tokens that came together, because the client was slower than the server, are 0 s apart.
        """
        return fmean(await self._steady_s(adapters, prompt, output))

    async def first_s(self, adapter: str, prompt: int) -> float:
        """How long a lone request waits for its first token."""
        (record,) = await self.send([adapter], prompt, 2)
        assert record.ttft_s is not None
        return record.ttft_s

    async def _steady_s(self, adapters: Sequence[str], prompt: int, output: int) -> list[float]:
        """Raises ConfigError if the requests never run together, however long they are."""
        for more in LONGER:
            records = await self.send(adapters, prompt, min(more * output, self.max_model_len - prompt))
            if gaps_s := steady_gaps_s(records):
                return gaps_s
        raise ConfigError("the requests of a wave never ran together: such a server cannot be measured")

    async def send(self, adapters: Sequence[str], prompt: int, output: int) -> list[RequestRecord]:
        """Raises ConfigError if a request fails: such a server cannot be measured."""
        requests = tuple(
            TraceRequest(
                arrival_s=0.0, adapter=adapter, prompt_tokens=prompt, output_tokens=output, seed=next(self._seeds)
            )
            for adapter in adapters
        )
        trace = Trace(requests=requests, warmup_s=0.0, duration_s=1.0)
        records = (await Driver(self.connection, self.vocab_size).run(trace)).records
        if failed := [record for record in records if not record.ok]:
            raise ConfigError(f"a request for adapter {failed[0].adapter!r} failed: {failed[0].status}")
        return records


def steady_gaps_s(records: Sequence[RequestRecord]) -> list[float]:
    """Times from token to token while all requests were running."""
    begin_s = max(record.token_times_s[0] for record in records)
    end_s = min(record.token_times_s[-1] for record in records)
    return [
        later - earlier
        for record in records
        for earlier, later in itertools.pairwise(record.token_times_s)
        if begin_s <= earlier and later <= end_s
    ]
