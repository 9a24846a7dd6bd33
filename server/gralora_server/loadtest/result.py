"""What a load test leaves behind, as one JSON document: read by the report, by the planner's check, and by people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from gralora_runtime.errors import ConfigError
from gralora_server.loadtest.overload import Overload
from gralora_server.loadtest.summary import Distribution, Frozen, Summary

VERSION = 1


class Sample(Frozen):
    """One second of a run, from its start."""

    at_s: float
    tokens: int
    requests_ended: int
    in_flight: int
    memory_bytes: int | None = None  # resident, of a server of our own


class ServerStory(Frozen):
    """What the server's own metrics page says of the run, which explains the client's figures. Seconds are sums."""

    steps: int
    mean_rows: float  # requests in a step
    phase_s: Mapping[str, float]  # schedule, build, forward, sample, deliver
    prefill_tokens: int
    decode_tokens: int
    queue_s: float  # mean of the wait in the queue
    adapter_wait_s: float  # mean wait for an adapter, of the requests that name one
    adapter_loads: int
    adapter_load_s: float  # all loads together
    adapter_evictions: int
    preemptions: int
    prefix_hit_tokens: int


class ChurnStats(Frozen):
    """Adapters that were unloaded and loaded again during the run."""

    unloads: int
    reload_s: Distribution  # both calls together
    failures: Mapping[str, int]  # by reason


class Prediction(Frozen):
    """What the planner said of a run before it took place."""

    summary: Summary
    memory_bytes: int


class RunResult(Frozen):
    """One run: one workload, one server."""

    system: str  # what was asked, as a reader calls it: "multi-adapter server"
    num_adapters: int
    summary: Summary
    timeline: tuple[Sample, ...]
    server: ServerStory | None = None  # None: it serves no metrics page
    memory_bytes: int | None = None  # resident, of the server's processes; None: not known
    churn: ChurnStats | None = None
    predicted: Prediction | None = None
    overload: Overload | None = None  # None: nobody asked how it fares under one


class Refusal(Frozen):
    """A system that could not be run."""

    system: str
    num_adapters: int
    why: str


class LoadTestResult(Frozen):
    """All runs of a report. Runs with different `num_adapters` of the same systems make a comparison over N."""

    version: int = VERSION
    title: str
    made_at: str  # ISO 8601
    machine: Mapping[str, str]  # what a reader must know: CPU, cores, memory, versions
    workload: Mapping[str, str]  # as the command line says it
    runs: tuple[RunResult, ...]
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()  # sentences that must be read before the figures

    def adding(self, outcome: RunResult | Refusal) -> LoadTestResult:
        if isinstance(outcome, Refusal):
            return self.model_copy(update={"refusals": (*self.refusals, outcome)})
        return self.model_copy(update={"runs": (*self.runs, outcome)})

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> LoadTestResult:
        """Raises ConfigError for what is no result of this version."""
        try:
            text = path.read_text()
        except OSError as cause:
            raise ConfigError(f"the result {path} cannot be read: {cause.strerror}") from cause
        try:
            return cls.model_validate_json(text)
        except ValidationError as cause:
            first = cause.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the document"
            raise ConfigError(f"{path} is no load test's result: {where}: {first['msg']}") from cause
