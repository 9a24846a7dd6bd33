"""Turns one snapshot of the engine into the page's series, in the scrape's own thread; keeps nothing between two."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from importlib.metadata import version

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.observation.snapshot import EngineSnapshot
from gralora_runtime.observation.usage import BASE
from gralora_server.gate import Gate, Phase
from gralora_server.metrics import series

BASE_LABEL = "(base)"  # no adapter can be called that, and an empty label would be no label
TIERS = {AdapterState.RESIDENT: "pool", AdapterState.HOST: "host"}


class EngineCollector(Collector):
    """While the model loads there is no engine, and only the server's own series."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._build = (version("gralora-server"), platform.python_version())  # reads a file: once, not at each scrape

    def collect(self) -> Iterator[Metric]:
        now_in = self._gate.phase
        yield series.BUILD_INFO.by({self._build: 1})
        yield series.PHASE.by({phase.name.lower(): int(phase is now_in) for phase in Phase})
        engine = self._gate.loaded
        if engine is not None:
            seen = engine.snapshot()
            yield from _model(seen)
            yield from _requests(seen)
            yield from _steps(seen)
            yield from _adapters(seen)
            yield from _by_adapter(seen)
            yield from _for_gateways(seen)


def _model(seen: EngineSnapshot) -> Iterator[Metric]:
    yield series.MODEL_INFO.by({tuple(getattr(seen.info, name) for name in series.MODEL_INFO.labels): 1})


def _requests(seen: EngineSnapshot) -> Iterator[Metric]:
    requests = seen.requests
    yield series.RECEIVED.value(requests.received)
    yield series.ENDED.by(requests.ended)
    yield series.RUNNING.value(seen.load.running)
    yield series.WAITING.value(seen.load.waiting)
    yield series.PREPARING.value(seen.load.waiting_for_adapter)
    yield series.PAUSED.value(seen.load.paused)
    yield series.QUEUE.histogram(requests.queue)
    yield series.ADAPTER_WAIT.histogram(requests.adapter_wait)
    yield series.FIRST_TOKEN.histogram(requests.first_token)
    yield series.FORECAST.histogram(requests.forecast)
    yield series.INTER_TOKEN.histogram(requests.inter_token)
    yield series.TOTAL.histogram(requests.total)


def _steps(seen: EngineSnapshot) -> Iterator[Metric]:
    load, steps = seen.load, seen.steps
    yield series.PREFILL_TOKENS.value(seen.prefill_tokens)
    yield series.DECODE_TOKENS.value(seen.decode_tokens)
    yield series.GENERATED_TOKENS.value(load.generated_tokens)
    yield series.PREFIX_HIT_TOKENS.value(load.prefix_hit_tokens)
    yield series.STEPS.value(load.steps)
    yield series.STEP_ROWS.histogram(steps.rows)
    yield series.STEP_TOKENS.histogram(steps.tokens)
    yield series.STEP_PHASE.histograms({str(phase): counts for phase, counts in steps.phases.items()})
    yield series.PREEMPTIONS.value(load.preemptions)
    yield series.PAUSES.value(load.pauses)
    yield series.INTERNAL_FAILURES.by({"request": load.request_failures, "step": load.step_failures})
    yield series.KV_PAGES.by({"free": load.pages_free, "cached": load.pages_cached, "leased": load.pages_leased})
    yield series.KV_PAGE_TOKENS.value(seen.info.page_size)


def _adapters(seen: EngineSnapshot) -> Iterator[Metric]:
    stats = seen.adapters
    yield series.ADAPTERS.by({str(state): count for state, count in seen.residency.counts.items()})
    yield series.ADAPTER_BYTES.by({"pool": stats.pool_bytes_used, "host": stats.host_bytes_used})
    yield series.ADAPTER_CAPACITY.by({"pool": stats.pool_bytes_total, "host": stats.host_bytes_total})
    yield series.ADAPTER_SLOTS.by({"used": stats.slots_used, "free": stats.slots_total - stats.slots_used})
    yield series.ADAPTER_LEASES.value(stats.leases)
    yield series.ADAPTER_LOADS.value(stats.loads)
    yield series.ADAPTER_FAILURES.value(stats.load_failures)
    yield series.ADAPTER_PLACEMENTS.value(stats.placements)
    yield series.ADAPTER_EVICTIONS.value(stats.evictions)
    yield series.ADAPTER_MOVES.value(stats.moves)
    yield series.ADAPTER_LOAD.histogram(stats.load_s)


def _by_adapter(seen: EngineSnapshot) -> Iterator[Metric]:
    tallies = {_labels(account): tally for account, tally in seen.requests.adapters.items()}
    yield series.BY_ADAPTER_REQUESTS.by({labels: tally.requests for labels, tally in tallies.items()})
    yield series.BY_ADAPTER_PROMPT.by({labels: tally.prompt_tokens for labels, tally in tallies.items()})
    yield series.BY_ADAPTER_GENERATED.by({labels: tally.generated_tokens for labels, tally in tallies.items()})
    yield series.BY_ADAPTER_BYTES.by(
        {(here.name, str(here.version), TIERS[here.state]): here.bytes for here in seen.residency.residences}
    )


def _labels(account: str) -> tuple[str, str]:
    """The adapter and its version, or those of a mix; neither the base model nor the account of all others has one."""
    if account == BASE:
        return BASE_LABEL, ""
    versions = [part.rpartition("@") for part in account.split("+")]
    names = "+".join(name or version for name, _, version in versions)
    return names, "+".join(version for name, _, version in versions if name)


def _for_gateways(seen: EngineSnapshot) -> Iterator[Metric]:
    """Under vLLM's names. A page has one `lora_requests_info`: a second one would be taken for the state of now."""
    load, info = seen.load, seen.info
    yield series.VLLM_WAITING.value(load.waiting + load.waiting_for_adapter)
    yield series.VLLM_RUNNING.value(load.running)
    yield series.VLLM_KV_USAGE.value(load.pages_leased / load.pages_total)
    most_in_one_batch = min(info.max_num_seqs, info.max_adapter_slots)
    running, waiting = (",".join(sorted(names)) for names in (seen.running_adapters, seen.waiting_adapters))
    yield series.VLLM_LORA.by({(str(most_in_one_batch), running, waiting): time.time()})
