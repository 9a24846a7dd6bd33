"""Waves: requests that are sent to an idle server at once, and how long its steps took by what came back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from gralora_runtime.errors import ConfigError
from gralora_server.client.connection import Connection
from gralora_server.loadtest.driver import Driver
from gralora_server.loadtest.record import RequestRecord
from gralora_server.loadtest.trace import Trace, TraceRequest
from gralora_server.planner.points import SHORT


@dataclass(slots=True)
class Waves:
    """To one server. Every prompt is another one."""

    connection: Connection
    vocab_size: int
    _seeds: itertools.count[int] = field(default_factory=itertools.count)

    async def step_s(self, adapters: Sequence[str], output: int, prompt: int = SHORT) -> float:
        """Median of the steps in which one request of each of these adapters decodes."""
        return median(steady_gaps_s(await self.send(adapters, prompt, output)))

    async def mean_step_s(self, adapters: Sequence[str], output: int) -> float:
        """The mean of such steps, which counts the slow ones as well."""
        return fmean(steady_gaps_s(await self.send(adapters, SHORT, output)))

    async def first_s(self, adapter: str, prompt: int) -> float:
        """How long a lone request waits for its first token."""
        (record,) = await self.send([adapter], prompt, 2)
        assert record.ttft_s is not None
        return record.ttft_s

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
    """Times from token to token while all requests were running. Raises ConfigError if there was no such time."""
    begin_s = max(record.token_times_s[0] for record in records)
    end_s = min(record.token_times_s[-1] for record in records)
    gaps_s = [
        later - earlier
        for record in records
        for earlier, later in itertools.pairwise(record.token_times_s)
        if begin_s <= earlier and later <= end_s
    ]
    if not gaps_s:
        raise ConfigError("the requests of a wave never ran together: the server is too busy to be measured")
    return gaps_s
