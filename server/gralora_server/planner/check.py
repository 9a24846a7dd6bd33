"""Sends the traffic that was planned to a real server, and puts the prediction beside what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from gralora_server.client.connection import Connection
from gralora_server.loadtest.driver import Progress
from gralora_server.loadtest.local_server import running
from gralora_server.loadtest.result import Prediction, RunResult
from gralora_server.loadtest.run import Target, run
from gralora_server.loadtest.trace import Trace
from gralora_server.planner.measure import option
from gralora_server.planner.search import Planner, summary_of
from gralora_server.planner.simulate import ServerPlan, simulate

ShowProgress = Callable[[str, float], AbstractContextManager[Callable[[Progress], None]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """`adapters` is a directory with all whose sizes are asked for."""

    planner: Planner
    model: Path
    adapters: Path
    environment: Mapping[str, str]
    progress: ShowProgress

    def run(self, label: str, sizes: Mapping[str, int], trace: Trace) -> RunResult:
        """Simulated first, then sent. Both begin with an empty pool."""
        planner, server = self.planner, self.planner.server(sizes)
        done = simulate(trace, planner.profile, server, sizes)
        predicted = Prediction(
            summary=summary_of(done, trace, planner.slo),
            memory_bytes=planner.memory_of(server, done.resident_bytes, done.evicted_bytes),
        )
        with running(self._arguments(server), self.environment) as local:
            connection = Connection(target=local.address)
            target = Target.at(connection, local.metrics_address)
            with self.progress(label, trace.duration_s) as on_progress:
                measured = asyncio.run(
                    run(target, trace, system="planned", label=label, slo=planner.slo, on_progress=on_progress)
                )
        return measured.model_copy(update={"num_adapters": len(sizes), "predicted": predicted})

    def _arguments(self, server: ServerPlan) -> list[str]:
        arguments = ["serve", "--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", "--log-level", "error"]
        return [
            *arguments,
            "--model",
            str(self.model),
            "--adapters",
            str(self.adapters),
            *serve_options(self.planner, server),
        ]


def serve_options(planner: Planner, server: ServerPlan) -> list[str]:
    """Of `gralora serve`, to be what was planned."""
    kv_bytes = server.num_pages * server.page_size * planner.profile.kv_token_bytes
    values = {
        **planner.profile.settings,
        "kv_cache_bytes": kv_bytes,
        "adapter_pool_bytes": server.adapter_pool_bytes,
        "host_cache_bytes": planner.host_cache_bytes,
    }
    return [part for name, value in values.items() for part in (option(name), str(value))]
