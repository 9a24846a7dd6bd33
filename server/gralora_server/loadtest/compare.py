"""The same customers served in four ways: together by one multi-adapter server, or by merged models.

Every system is our own engine behind the same gRPC service, driven by the same trace, one system after another on the
same machine. So the difference is the deployment and not the code.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gralora_runtime.errors import ConfigError
from gralora_server.client.connection import Connection
from gralora_server.client.errors import GraloraClientError
from gralora_server.loadtest.driver import Progress
from gralora_server.loadtest.headers import num_parameters, num_tied_parameters, weight_shapes
from gralora_server.loadtest.local_server import running
from gralora_server.loadtest.result import Refusal, RunResult
from gralora_server.loadtest.run import Target, load_adapters, run
from gralora_server.loadtest.summary import Slo
from gralora_server.loadtest.trace import Trace

MULTI = "multi-adapter server"
TURNS = "merged models in turn"
FLEET = "merged models, swapped"
IDEAL = "one merged model (a single customer)"
SYSTEMS = {"multi": MULTI, "turns": TURNS, "fleet": FLEET, "ideal": IDEAL}
# Beside its merged models a fleet's process has the base model, once to serve and once to merge into, its libraries,
# and a model that is being made. Measured: 3.0 GB with SmolLM2-135M, and 0.61 to 0.65 GB more for each merged model.
OVERHEAD_BYTES = 3 << 30
LEAST_POOL_BYTES = 256 << 20
# Weights that were freed go back to the system, and do not stay as holes in a fleet's memory.
FLEET_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What stays the same for all systems. `progress` shows one run and gives its callback."""

    model: Path
    adapters: Path
    names: Sequence[str]  # of adapters in that directory; N takes the first N
    trace: Callable[[Sequence[str]], Trace]
    slo: Slo
    memory_bytes: int  # budget of a system
    warm: bool  # the multi-adapter server holds as many adapters as it has room for, the likeliest, when a run begins
    max_num_seqs: int
    kv_cache_bytes: int
    environment: Mapping[str, str]
    progress: Callable[[str, float], object]  # a context manager of Callable[[Progress], None]

    def run(self, systems: Sequence[str], counts: Sequence[int], rounds: int = 1) -> Iterator[RunResult | Refusal]:
        """Everything once in each round, and for each N all systems in turn: so a slow minute of the machine hits
        neither one system nor one N alone. What was refused is not tried again."""
        refused = set()
        for number in range(1, rounds + 1):
            for count in counts:
                for system in self._apart(systems, count):
                    if (system, count) in refused:
                        continue
                    outcome = self._one(system, count, f", round {number}" if rounds > 1 else "")
                    if isinstance(outcome, Refusal):
                        refused.add((system, count))
                    yield outcome

    def _apart(self, systems: Sequence[str], count: int) -> list[str]:
        """Without the fleet that swaps where nothing has to be swapped: it is then the one that keeps all."""
        swaps = count > self.models_that_fit() or "turns" not in systems
        return [system for system in systems if system != "fleet" or swaps]

    def _one(self, system: str, count: int, which: str) -> RunResult | Refusal:
        if reason := self._why_not(system, count):
            return Refusal(system=SYSTEMS[system], num_adapters=count, why=reason)
        trace = self.trace(self.names[:count])
        if system == "ideal":
            trace = replace(trace, requests=tuple(replace(one, adapter=self.names[0]) for one in trace.requests))
        try:
            with self._server(system, count) as target:
                if self.warm and system == "multi":
                    asyncio.run(load_adapters(target, reversed(self.names[:count])))
                return self._drive(target, trace, system, count, which)
        except (ConfigError, GraloraClientError) as failure:
            return Refusal(system=SYSTEMS[system], num_adapters=count, why=str(failure))

    def _drive(self, target: Target, trace: Trace, system: str, count: int, which: str) -> RunResult:
        label = f"{SYSTEMS[system]}, {count} adapter{'s' if count > 1 else ''}{which}"
        on_progress: Callable[[Progress], None]
        with self.progress(label, trace.duration_s) as on_progress:  # type: ignore[attr-defined]
            done = asyncio.run(
                run(target, trace, system=SYSTEMS[system], label=label, slo=self.slo, on_progress=on_progress)
            )
        return done.model_copy(update={"num_adapters": count})

    def _why_not(self, system: str, count: int) -> str | None:
        fit = self.models_that_fit()
        if system == "turns" and count > fit:
            needed = (count * model_bytes(self.model) + OVERHEAD_BYTES + self.kv_cache_bytes) / 1e9
            return f"{count} merged models need {needed:.0f} GB; the budget is {self.memory_bytes / 1e9:.0f} GB"
        return None

    def models_that_fit(self) -> int:
        """Merged models whose weights fit the budget beside what every process needs."""
        return max(1, self._room_bytes() // model_bytes(self.model))

    def pool_bytes(self) -> int:
        """Of the multi-adapter server: what the budget leaves beside what every process needs."""
        return max(LEAST_POOL_BYTES, self._room_bytes())

    def _room_bytes(self) -> int:
        return self.memory_bytes - OVERHEAD_BYTES - self.kv_cache_bytes

    @contextmanager
    def _server(self, system: str, count: int) -> Iterator[Target]:
        common = ["--address", "127.0.0.1:0", "--log-level", "error", "--model", str(self.model)]
        common += ["--adapters", str(self.adapters), "--max-num-seqs", str(self.max_num_seqs)]
        common += ["--kv-cache-bytes", str(self.kv_cache_bytes)]
        if system == "multi":
            # Prompts are random, so that a prefix cache would find nothing; a fleet's models have one each.
            pool = ["--adapter-pool-bytes", str(self.pool_bytes())]
            command, environment = ["serve", *common, *pool, "--metrics-address", "127.0.0.1:0"], self.environment
        else:
            models = 1 if system == "ideal" else min(self.models_that_fit(), count)
            command = ["serve-fleet", *common, "--max-models", str(models)]
            command += [part for name in self.names[:models] for part in ("--preload", name)]
            environment = {**self.environment, **FLEET_ENVIRONMENT}
        with running(command, environment) as local:
            connection = Connection(target=local.address)
            yield replace(Target.at(connection, local.metrics_address), memory_bytes=lambda: local.memory_bytes)


def model_bytes(model: Path) -> int:
    """Of a merged model as it is served, in fp32. A head that shares the embedding's weights is there twice, packed."""
    shapes = weight_shapes(model)
    return 4 * (num_parameters(shapes) + num_tied_parameters(shapes))
