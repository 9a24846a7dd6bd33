"""Every series of the page: its name, type, labels and meaning. `docs/metrics.md` is this table; a test compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeVar

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from gralora_runtime.observation.histogram import HistogramCounts, Owner
from gralora_server.tenants.request_ids import unscoped

REQUEST_ID = "request_id"
TRACE_ID = "trace_id"  # what Grafana follows to a trace: deploy/grafana/datasources.yaml
MAX_EXEMPLAR_CHARS = 128  # of names and values of its labels, as OpenMetrics has it
Bucket = tuple[str, float] | tuple[str, float, Exemplar]
Key = TypeVar("Key", bound=str | tuple[str, ...])  # the values of a series' labels


@dataclass(frozen=True, slots=True)
class Series:
    """One family. `value`, `by` and `histograms` make what a collector yields."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()

    def value(self, value: float) -> Metric:
        return self.by({(): value})

    def by(self, values: Mapping[Key, float]) -> Metric:
        """A sample for each combination of the labels' values."""
        make = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = make(self.name, self.text, labels=self.labels)
        for key, value in values.items():
            family.add_metric(_label_values(key), value)
        return family

    def histograms(self, counts: Mapping[Key, HistogramCounts]) -> Metric:
        family = HistogramMetricFamily(self.name, self.text, labels=self.labels)
        for key, read in counts.items():
            family.add_metric(_label_values(key), list(_buckets(read)), read.sum)
        return family

    def histogram(self, counts: HistogramCounts) -> Metric:
        return self.histograms({(): counts})


def _buckets(read: HistogramCounts) -> Iterator[Bucket]:
    """Each with what has come up to its bound, and with a request that had such a value, where that is known."""
    bounds = [*map(floatToGoString, read.bounds), "+Inf"]
    exemplars = read.exemplars or (None,) * len(bounds)
    for bound, count, exemplar in zip(bounds, accumulate(read.counts), exemplars, strict=True):
        labels = _exemplar_labels(exemplar.whose) if exemplar is not None else {}
        if exemplar is None or not labels:
            yield bound, count
        else:
            yield bound, count, Exemplar(labels, exemplar.value, exemplar.at_s)


def _exemplar_labels(whose: Owner) -> dict[str, str]:
    """As many as there is room for, the trace first: it has the request's id, too."""
    labels: dict[str, str] = {}
    room = MAX_EXEMPLAR_CHARS
    for name, value in ((TRACE_ID, whose.trace_id), (REQUEST_ID, unscoped(whose.request_id))):
        if value and len(name) + len(value) <= room:
            labels[name] = value
            room -= len(name) + len(value)
    return labels


def _label_values(key: str | tuple[str, ...]) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


# The server.
BUILD_INFO = Series("gralora_build_info", "gauge", "Always 1; the labels say what runs.", ("version", "python"))
PHASE = Series("gralora_server_phase", "gauge", "1 for the phase that the server is in, 0 for the others.", ("phase",))
MODEL_INFO = Series(
    "gralora_model_info",
    "gauge",
    "Always 1; the labels say what is served and with what.",
    ("model", "model_type", "model_digest", "dtype", "device", "kernel_backend"),
)

# Requests.
RECEIVED = Series("gralora_requests_received_total", "counter", "Requests that reached the engine.")
ENDED = Series(
    "gralora_requests_ended_total",
    "counter",
    "Requests that ended, by finish reason or by the reason of their error.",
    ("outcome",),
)
RUNNING = Series("gralora_requests_running", "gauge", "Requests in the batch.")
WAITING = Series("gralora_requests_waiting", "gauge", "Requests that wait for a row or for KV pages.")
PAUSED = Series("gralora_requests_paused", "gauge", "Requests that wait for their client to read on.")
PREPARING = Series(
    "gralora_requests_preparing", "gauge", "Requests that are being tokenized or wait for their adapter."
)
QUEUE = Series(
    "gralora_request_queue_seconds", "histogram", "From submission to the batch, the wait for the adapter included."
)
ADAPTER_WAIT = Series(
    "gralora_request_adapter_wait_seconds", "histogram", "Wait of a request for its adapter to be in the pool."
)
FIRST_TOKEN = Series("gralora_time_to_first_token_seconds", "histogram", "From submission to the first token.")
FORECAST = Series(
    "gralora_first_token_forecast_ratio", "histogram", "What the first token took, over what was foretold on arrival."
)
INTER_TOKEN = Series("gralora_inter_token_seconds", "histogram", "From one token of a request to its next.")
TOTAL = Series("gralora_request_seconds", "histogram", "From submission to the last token, of requests that finished.")

# Tokens.
PREFILL_TOKENS = Series(
    "gralora_prefill_tokens_total", "counter", "Tokens computed in prompts, or again after preemption."
)
DECODE_TOKENS = Series("gralora_decode_tokens_total", "counter", "Tokens computed one at a time, after the prompt.")
GENERATED_TOKENS = Series("gralora_generated_tokens_total", "counter", "Tokens sampled.")
PREFIX_HIT_TOKENS = Series(
    "gralora_prefix_hit_tokens_total", "counter", "Tokens that were not computed because the prefix cache had them."
)

# Steps and KV pages.
STEPS = Series("gralora_steps_total", "counter", "Forward passes.")
STEP_ROWS = Series("gralora_step_rows", "histogram", "Requests in a step.")
STEP_TOKENS = Series("gralora_step_tokens", "histogram", "Tokens in a step.")
STEP_PHASE = Series("gralora_step_phase_seconds", "histogram", "Time that each part of a step took.", ("phase",))
PREEMPTIONS = Series(
    "gralora_preemptions_total", "counter", "Requests that gave their row or their KV pages to others, for a while."
)
PAUSES = Series("gralora_pauses_total", "counter", "Requests that stopped because their client did not read.")
INTERNAL_FAILURES = Series(
    "gralora_internal_failures_total",
    "counter",
    "Exceptions in the engine that ended one request (request) or all requests of a step (step).",
    ("scope",),
)
KV_PAGES = Series(
    "gralora_kv_pages",
    "gauge",
    "KV pages: free, held by requests, or held by the prefix cache alone. Their sum is constant.",
    ("state",),
)
KV_PAGE_TOKENS = Series("gralora_kv_page_tokens", "gauge", "Tokens that one KV page holds.")

# Adapters, all together.
ADAPTERS = Series(
    "gralora_adapters",
    "gauge",
    "Adapters in the catalogue: on disk, loading, in host memory, in the pool, or failed to load.",
    ("state",),
)
ADAPTER_BYTES = Series("gralora_adapter_bytes", "gauge", "Memory that adapters take.", ("tier",))
ADAPTER_CAPACITY = Series("gralora_adapter_capacity_bytes", "gauge", "Memory that there is for adapters.", ("tier",))
ADAPTER_SLOTS = Series("gralora_adapter_slots", "gauge", "Slots of the pool, one an adapter.", ("state",))
ADAPTER_LEASES = Series("gralora_adapter_leases", "gauge", "Requests that hold their adapter in the pool.")
ADAPTER_LOADS = Series("gralora_adapter_loads_total", "counter", "Adapters that came from disk.")
ADAPTER_FAILURES = Series("gralora_adapter_load_failures_total", "counter", "Reads of an adapter that failed.")
ADAPTER_PLACEMENTS = Series(
    "gralora_adapter_placements_total", "counter", "Adapters that moved into the pool, from disk or host memory."
)
ADAPTER_EVICTIONS = Series("gralora_adapter_evictions_total", "counter", "Adapters that left the pool for another one.")
ADAPTER_MOVES = Series(
    "gralora_adapter_moves_total", "counter", "Pinned adapters that made way within the pool for a larger one."
)
ADAPTER_LOAD = Series(
    "gralora_adapter_load_seconds", "histogram", "Reading, checking and packing one adapter, failed reads included."
)

# Adapters by name.
BY_ADAPTER_REQUESTS = Series(
    "gralora_adapter_requests_total",
    "counter",
    "Requests that were queued, by adapter and version.",
    ("adapter", "version"),
)
BY_ADAPTER_PROMPT = Series(
    "gralora_adapter_prompt_tokens_total",
    "counter",
    "Prompt tokens of those requests, cached ones too.",
    ("adapter", "version"),
)
BY_ADAPTER_GENERATED = Series(
    "gralora_adapter_generated_tokens_total",
    "counter",
    "Tokens delivered to those requests.",
    ("adapter", "version"),
)
BY_ADAPTER_BYTES = Series(
    "gralora_adapter_resident_bytes",
    "gauge",
    "Memory of an adapter that is in the pool or host memory.",
    ("adapter", "version", "tier"),
)

# By tenant.
BY_TENANT_REQUESTS = Series(
    "gralora_tenant_requests_total", "counter", "Requests of a tenant that the engine took on.", ("tenant",)
)
BY_TENANT_PROMPT = Series(
    "gralora_tenant_prompt_tokens_total", "counter", "Prompt tokens of those requests, cached ones too.", ("tenant",)
)
BY_TENANT_CACHED = Series(
    "gralora_tenant_cached_tokens_total", "counter", "Prompt tokens of these that the prefix cache had.", ("tenant",)
)
BY_TENANT_OUTPUT = Series(
    "gralora_tenant_output_tokens_total", "counter", "Tokens generated for those requests.", ("tenant",)
)
BY_TENANT_REFUSED = Series(
    "gralora_tenant_refused_total",
    "counter",
    "Requests and uploads of a tenant that were refused for a quota or a full queue.",
    ("tenant",),
)
BY_TENANT_UPLOADED = Series(
    "gralora_tenant_upload_bytes_total", "counter", "Bytes of a tenant's uploads that were received.", ("tenant",)
)

# What gateways scrape.
VLLM_WAITING = Series("vllm:num_requests_waiting", "gauge", "Requests that wait, for whatever reason.")
VLLM_RUNNING = Series("vllm:num_requests_running", "gauge", "Requests in the batch.")
VLLM_KV_USAGE = Series("vllm:kv_cache_usage_perc", "gauge", "Share of the KV pages that requests hold, 0 to 1.")
VLLM_LORA = Series(
    "vllm:lora_requests_info",
    "gauge",
    "When it was read, in seconds since the epoch; the labels name the adapters of running and waiting requests.",
    ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
)

ALL = tuple(value for value in globals().copy().values() if isinstance(value, Series))
