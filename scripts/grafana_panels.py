"""What the dashboards show: `grafana_dashboards.py` writes them. A query names series as they are, of all servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

WINDOW = "$__rate_interval"
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Query:
    """`legend`: in Grafana's words, `{{label}}` is the label's value."""

    expression: str
    legend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """`unit`: one of Grafana's. `says`: what its reader should know."""

    title: str
    says: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: Literal["timeseries", "stat", "table"] = "timeseries"
    width: int = 12
    height: int = 8
    stacked: bool = False
    names: dict[str, str] = field(default_factory=dict)  # of a table's columns, by label or query


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """One file."""

    name: str
    title: str
    panels: tuple[Panel, ...]


def per_second(series: str, by: str = "") -> str:
    rate = f"rate({series}[{WINDOW}])"
    return f"sum by ({by}) ({rate})" if by else f"sum({rate})"


def percentiles(histogram: str) -> tuple[Query, ...]:
    rate = f"sum by (le) (rate({histogram}_bucket[{WINDOW}]))"
    return tuple(Query(f"histogram_quantile({p / 100:g}, {rate})", f"{p} %") for p in PERCENTILES)


def share(part: str, *others: str) -> str:
    """Of the sum of counters, what one of them is. Nothing where none of them grows."""
    rates = [per_second(series) for series in (part, *others)]
    return f"{rates[0]} / ({' + '.join(rates)} > 0)"


def one(expression: str, legend: str = "") -> tuple[Query, ...]:
    return (Query(expression, legend),)


def figure(title: str, says: str, expression: str, unit: str = "short") -> Panel:
    """A number of its own; six to a row."""
    return Panel(title=title, says=says, queries=one(expression), unit=unit, kind="stat", width=4, height=4)


def ranking(title: str, says: str, label: str, columns: dict[str, str]) -> Panel:
    """A table of the busiest; `columns`: expressions by their heads, the first of them decides who is in it."""
    letters = dict(zip("ABCDEF", columns.items(), strict=False))
    names = {label: label.capitalize()} | {f"Value #{letter}": head for letter, (head, _) in letters.items()}
    queries = tuple(Query(expression) for _, expression in letters.values())
    return Panel(title=title, says=says, queries=queries, kind="table", width=24, height=10, names=names)


SERVER = Dashboard(
    name="server",
    title="GraLoRA server",
    panels=(
        figure("Serving", "Servers that take requests.", 'sum(gralora_server_phase{phase="serving"})'),
        figure("Running", "Requests in the batch.", "sum(gralora_requests_running)"),
        figure(
            "Waiting",
            "For a row, for KV pages or for their adapter.",
            "sum(gralora_requests_waiting) + sum(gralora_requests_preparing)",
        ),
        figure("Tokens a second", "That were sampled.", per_second("gralora_generated_tokens_total")),
        figure(
            "First token, 95 %",
            "From submission to the first token.",
            percentiles("gralora_time_to_first_token_seconds")[1].expression,
            "s",
        ),
        figure(
            "KV pages held",
            "By requests, of all. At 100 % requests wait, or give way to one another.",
            'sum(gralora_kv_pages{state="leased"}) / sum(gralora_kv_pages)',
            "percentunit",
        ),
        Panel(
            title="Tokens a second",
            says="What was computed: prompts, and the answers' tokens one at a time.",
            queries=(
                Query(per_second("gralora_prefill_tokens_total"), "prompts"),
                Query(per_second("gralora_decode_tokens_total"), "answers"),
                Query(per_second("gralora_prefix_hit_tokens_total"), "found in the prefix cache"),
            ),
        ),
        Panel(
            title="Requests",
            says="Paused: their clients do not read.",
            queries=tuple(
                Query(f"sum(gralora_requests_{name})", name) for name in ("running", "waiting", "preparing", "paused")
            ),
            stacked=True,
        ),
        Panel(
            title="First token",
            says="From submission to the first token.",
            queries=percentiles("gralora_time_to_first_token_seconds"),
            unit="s",
        ),
        Panel(
            title="Between tokens",
            says="From one token of a request to its next.",
            queries=percentiles("gralora_inter_token_seconds"),
            unit="s",
        ),
        Panel(
            title="Whole requests",
            says="From submission to the last token, of those that finished.",
            queries=percentiles("gralora_request_seconds"),
            unit="s",
        ),
        Panel(
            title="Queue",
            says="From submission to the batch, the wait for the adapter included.",
            queries=percentiles("gralora_request_queue_seconds"),
            unit="s",
        ),
        Panel(
            title="How requests ended",
            says="By finish reason, or by the reason of their error.",
            queries=one(per_second("gralora_requests_ended_total", "outcome"), "{{outcome}}"),
            unit="reqps",
            stacked=True,
        ),
        Panel(
            title="First token, over what was foretold",
            says="1: as foretold on arrival. Above it, objectives are missed by requests that were let in.",
            queries=percentiles("gralora_first_token_forecast_ratio"),
        ),
        Panel(
            title="Where a step's time goes",
            says="Seconds of each phase in a second. On a GPU sampling waits for the forward pass.",
            queries=one(per_second("gralora_step_phase_seconds_sum", "phase"), "{{phase}}"),
            unit="s",
            stacked=True,
        ),
        Panel(
            title="A step",
            says="On average.",
            queries=(
                Query(
                    f"{per_second('gralora_step_rows_sum')} / ({per_second('gralora_step_rows_count')} > 0)", "requests"
                ),
                Query(
                    f"{per_second('gralora_step_tokens_sum')} / ({per_second('gralora_step_tokens_count')} > 0)",
                    "tokens",
                ),
            ),
        ),
        Panel(
            title="KV pages",
            says="Cached pages are free when needed.",
            queries=one("sum by (state) (gralora_kv_pages)", "{{state}}"),
            stacked=True,
        ),
        Panel(
            title="Prompt tokens from the prefix cache",
            says="Of all that prompts had.",
            queries=one(share("gralora_prefix_hit_tokens_total", "gralora_prefill_tokens_total")),
            unit="percentunit",
        ),
        Panel(
            title="Giving way",
            says="Requests a second that lost their pages for a while, or stopped for a client that does not read; and "
            "exceptions of ours.",
            queries=(
                Query(per_second("gralora_preemptions_total"), "preempted"),
                Query(per_second("gralora_pauses_total"), "paused"),
                Query(per_second("gralora_internal_failures_total", "scope"), "failed: {{scope}}"),
            ),
            unit="reqps",
        ),
        Panel(
            title="Process",
            says="Memory of each server's process.",
            queries=one("process_resident_memory_bytes", "{{instance}}"),
            unit="bytes",
        ),
    ),
)

ADAPTERS = Dashboard(
    name="adapters",
    title="GraLoRA adapters",
    panels=(
        figure("In the pool", "Adapters that steps can use now.", 'sum(gralora_adapters{state="resident"})'),
        figure("In host memory", "A copy away from the pool.", 'sum(gralora_adapters{state="host"})'),
        figure("On disk", "To be read by their next request.", 'sum(gralora_adapters{state="registered"})'),
        figure("Failed", "Whose last load failed.", 'sum(gralora_adapters{state="failed"})'),
        figure(
            "Pool in use",
            "Of its bytes.",
            'sum(gralora_adapter_bytes{tier="pool"}) / sum(gralora_adapter_capacity_bytes{tier="pool"})',
            "percentunit",
        ),
        figure("Leases", "Requests that hold their adapter in the pool.", "sum(gralora_adapter_leases)"),
        Panel(
            title="Where adapters are",
            says="All of the catalogue.",
            queries=one("sum by (state) (gralora_adapters)", "{{state}}"),
            stacked=True,
        ),
        Panel(
            title="Memory",
            says="That adapters take, and that there is.",
            queries=(
                Query("sum by (tier) (gralora_adapter_bytes)", "{{tier}}"),
                Query("sum by (tier) (gralora_adapter_capacity_bytes)", "{{tier}}, all there is"),
            ),
            unit="bytes",
        ),
        Panel(
            title="Coming and going",
            says="Evictions that keep pace with placements: the pool is too small for who is asked for.",
            queries=(
                Query(per_second("gralora_adapter_loads_total"), "read from disk"),
                Query(per_second("gralora_adapter_placements_total"), "into the pool"),
                Query(per_second("gralora_adapter_evictions_total"), "out of the pool"),
                Query(per_second("gralora_adapter_moves_total"), "within the pool"),
                Query(per_second("gralora_adapter_load_failures_total"), "failed"),
            ),
            unit="ops",
        ),
        Panel(
            title="What requests wait for their adapter",
            says="Nothing where it is in the pool already.",
            queries=percentiles("gralora_request_adapter_wait_seconds"),
            unit="s",
        ),
        Panel(
            title="One load",
            says="Reading, checking and packing one adapter.",
            queries=percentiles("gralora_adapter_load_seconds"),
            unit="s",
        ),
        Panel(
            title="Slots",
            says="Of the pool, one an adapter.",
            queries=one("sum by (state) (gralora_adapter_slots)", "{{state}}"),
            stacked=True,
        ),
        Panel(
            title="Tokens a second by adapter",
            says="The ten busiest; adapters without a name of their own are `other`.",
            queries=one(f"topk(10, {per_second('gralora_adapter_generated_tokens_total', 'adapter')})", "{{adapter}}"),
            stacked=True,
        ),
        Panel(
            title="Tokens a second by version",
            says="A canary beside what it may replace.",
            queries=one(
                f"topk(10, {per_second('gralora_adapter_generated_tokens_total', 'adapter, version')})",
                "{{adapter}}@{{version}}",
            ),
            stacked=True,
        ),
        ranking(
            "Busiest adapters",
            "Of the last hour.",
            "adapter",
            {
                "Requests": "topk(20, sum by (adapter) (increase(gralora_adapter_requests_total[1h])))",
                "Prompt tokens": "sum by (adapter) (increase(gralora_adapter_prompt_tokens_total[1h]))",
                "Output tokens": "sum by (adapter) (increase(gralora_adapter_generated_tokens_total[1h]))",
                "Bytes in memory": "sum by (adapter) (gralora_adapter_resident_bytes)",
            },
        ),
    ),
)

TENANTS = Dashboard(
    name="tenants",
    title="GraLoRA tenants",
    panels=(
        Panel(
            title="Output tokens a second",
            says="The ten tenants with the most.",
            queries=one(f"topk(10, {per_second('gralora_tenant_output_tokens_total', 'tenant')})", "{{tenant}}"),
            stacked=True,
        ),
        Panel(
            title="Prompt tokens a second",
            says="Those of the prefix cache included.",
            queries=one(f"topk(10, {per_second('gralora_tenant_prompt_tokens_total', 'tenant')})", "{{tenant}}"),
            stacked=True,
        ),
        Panel(
            title="Requests a second",
            says="That the engine took on.",
            queries=one(f"topk(10, {per_second('gralora_tenant_requests_total', 'tenant')})", "{{tenant}}"),
            unit="reqps",
            stacked=True,
        ),
        Panel(
            title="Refused a second",
            says="For a quota or a full queue.",
            queries=one(f"topk(10, {per_second('gralora_tenant_refused_total', 'tenant')})", "{{tenant}}"),
            unit="reqps",
            stacked=True,
        ),
        Panel(
            title="Prompt tokens from the prefix cache",
            says="Of each tenant's prompts.",
            queries=one(
                f"{per_second('gralora_tenant_cached_tokens_total', 'tenant')}"
                f" / ({per_second('gralora_tenant_prompt_tokens_total', 'tenant')} > 0)",
                "{{tenant}}",
            ),
            unit="percentunit",
        ),
        Panel(
            title="Uploads",
            says="Bytes a second.",
            queries=one(f"topk(10, {per_second('gralora_tenant_upload_bytes_total', 'tenant')})", "{{tenant}}"),
            unit="Bps",
        ),
        ranking(
            "Tenants",
            "Of the last hour. Bills are made of `gralora usage`.",
            "tenant",
            {
                "Output tokens": "topk(50, sum by (tenant) (increase(gralora_tenant_output_tokens_total[1h])))",
                "Prompt tokens": "sum by (tenant) (increase(gralora_tenant_prompt_tokens_total[1h]))",
                "Requests": "sum by (tenant) (increase(gralora_tenant_requests_total[1h]))",
                "Refused": "sum by (tenant) (increase(gralora_tenant_refused_total[1h]))",
                "Bytes uploaded": "sum by (tenant) (increase(gralora_tenant_upload_bytes_total[1h]))",
            },
        ),
    ),
)

DASHBOARDS = (SERVER, ADAPTERS, TENANTS)
