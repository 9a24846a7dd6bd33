"""What `gralora top` draws. Knows no server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gralora_runtime.observation.steps import Phase
from gralora_server.cli.output import human_bytes

if TYPE_CHECKING:  # records alone, but grpc is imported before them
    from gralora_runtime.info import EngineLoad
    from gralora_runtime.observation.activity import RequestActivity
    from gralora_runtime.observation.usage import Tally
    from gralora_server.client import Adapter, ServerInfo

BARS = "▁▂▃▄▅▆▇█"
SPARK = 60  # points of a line
MIN_REQUESTS = 5
OTHER_LINES = 13  # the heading's, the lines', and the heads of three tables
STAGES = {
    "tokenize": "tokenizing",
    "grammar": "compiling its grammar",
    "adapter": "loading its adapter",
    "queue": "waiting",
    "prefill": "prompt",
    "decode": "answering",
    "preempted": "waiting again",
    "paused": "paused",
    "delivery": "ending",
}
HOLDS = {"place": "for a row", "pages": "for KV pages", "turn": "for its turn"}
TIMES = {1: "once", 2: "twice"}
OPERATOR = "(operator)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """One look."""

    info: ServerInfo
    load: EngineLoad
    points: Mapping[str, Sequence[float | None]]  # see `History.points`
    phases: Mapping[str, float]  # seconds of an average step
    requests: Sequence[RequestActivity]  # in the order in which they are shown
    traffic: Mapping[str, Tally]  # by the busiest adapters and their versions
    adapters: Mapping[str, Adapter]  # of these, what is known
    adapter_rates: Mapping[str, float]  # tokens a second
    used: Mapping[str, int]  # output tokens by tenant
    tenant_rates: Mapping[str, float]


def draw(screen: Screen, *, height: int | None) -> RenderableType:
    """`height`: lines that there are; requests that do not fit are counted. None: as many as it takes."""
    taken = OTHER_LINES + len(screen.traffic) + len(_tenant_names(screen))
    most = len(screen.requests) if height is None else max(MIN_REQUESTS, height - taken)
    requests = _requests(screen.requests, most)
    return Group(_heading(screen), _lines(screen), requests, _adapters(screen), _tenants(screen))


def _heading(screen: Screen) -> Text:
    load, info = screen.load, screen.info
    counts = {
        "running": load.running,
        "waiting": load.waiting,
        "preparing": load.waiting_for_adapter,
        "paused": load.paused,
        "gave way": load.preemptions,
        "failures": load.request_failures + load.step_failures,
    }
    pages = f"KV pages {load.pages_leased} + {load.pages_cached} cached of {load.pages_total}"
    pool = f"pool {human_bytes(load.adapter_pool_bytes_used)} of {human_bytes(load.adapter_pool_bytes_total)}"
    text = Text(f"{info.model}, {info.dtype} on {info.device}\n", style="bold")
    text.append("   ".join(f"{name} {count}" for name, count in counts.items()) + "\n", style="none")
    text.append(f"{pages}   {pool}, {load.adapter_slots_used} of {load.adapter_slots_total} slots", style="none")
    return text


def _lines(screen: Screen) -> Table:
    """A number and its line over time each; then where a step's time goes."""
    table = Table.grid(padding=(0, 2))
    for title, name, write in (
        ("tokens a second", "generated_tokens_per_s", lambda value: f"{value:.0f}"),
        ("first token, 95 %", "first_token_p95", seconds),
        ("between tokens, 99 %", "between_p99", seconds),
    ):
        column = screen.points[name]
        last = column[-1] if column else None
        table.add_row(title, Text("–" if last is None else write(last), justify="right"), Text(spark(column), "cyan"))
    step = "  ".join(f"{phase} {seconds(screen.phases[phase])}" for phase in Phase if phase in screen.phases)
    table.add_row("a step", Text(seconds(sum(screen.phases.values())), justify="right"), Text(step))
    return table


def _requests(requests: Sequence[RequestActivity], most: int) -> Table:
    hidden = len(requests) - most
    table = _table(
        f"Requests: {len(requests)}" + (f", {hidden} not shown" if hidden > 0 else ""),
        *("request", "tenant", "adapter", "phase", ">prompt", ">answer", ">age", "why it waits"),
    )
    for one in requests[:most]:
        adapter = f"{one.adapter}@{one.version}" if one.version else one.adapter or "base model"
        answer = f"{one.output_tokens}/{one.max_tokens or '–'}"
        cells = (one.request_id, one.tenant or OPERATOR, adapter, STAGES[one.stage], str(one.prompt_tokens or "–"))
        table.add_row(*map(Text, (*cells, answer, seconds(one.age_s), why(one))))
    return table


def _adapters(screen: Screen) -> Table:
    table = _table("Busiest adapters", "adapter", "where", ">size", ">in use", ">tokens/s", ">tokens", ">requests")
    for account, tally in screen.traffic.items():
        adapter = screen.adapters.get(account)
        where, size, in_use = ("–", "–", "–")
        if adapter is not None:
            where, size, in_use = adapter.state.value, human_bytes(adapter.pool_bytes), str(adapter.in_flight)
        rate = screen.adapter_rates.get(account)
        cells = (account, where, size, in_use, _rate(rate), str(tally.generated_tokens), str(tally.requests))
        table.add_row(*map(Text, cells))
    return table


def _tenants(screen: Screen) -> Table:
    table = _table("Tenants", "tenant", ">share", ">tokens/s", ">under way", ">tokens")
    under_way = Counter(one.tenant for one in screen.requests)
    whole = sum(screen.tenant_rates.values())
    for tenant in _tenant_names(screen):
        rate = screen.tenant_rates.get(tenant)
        share = f"{rate / whole:.0%}" if rate is not None and whole else "–"
        used = str(screen.used.get(tenant, 0))
        table.add_row(*map(Text, (tenant or OPERATOR, share, _rate(rate), str(under_way[tenant]), used)))
    return table


def _tenant_names(screen: Screen, most: int = 6) -> list[str]:
    found = {*screen.used, *(one.tenant for one in screen.requests)}
    return sorted(found, key=lambda one: (-screen.tenant_rates.get(one, 0.0), -screen.used.get(one, 0), one))[:most]


def _table(title: str, *headings: str) -> Table:
    """A heading with > before it is that of numbers."""
    table = Table(box=None, title=Text(title, style="bold"), title_justify="left", padding=(0, 2, 0, 0))
    for heading in headings:
        is_number = heading.startswith(">")
        table.add_column(heading.lstrip(">"), justify="right" if is_number else "left", no_wrap=True)
    return table


def why(one: RequestActivity) -> str:
    """It waits, if it does; and how often it gave way."""
    said = {
        "tokenize": "for its prompt to be tokenized",
        "adapter": "for its adapter to be in the pool",
        "paused": "for its client to read",
    }.get(one.stage, "")
    if one.hold is not None:
        said = f"{HOLDS[one.hold]}, {f'{one.ahead} before it' if one.ahead else 'next'}"
    often = TIMES.get(one.preemptions, f"{one.preemptions} times")
    gave_way = f"gave way {often}" if one.preemptions else ""
    return "; ".join(filter(None, (said, gave_way)))


def spark(column: Sequence[float | None]) -> str:
    """The last values as bars, the highest of them as high as can be; a gap where there is none."""
    shown = column[-SPARK:]
    highest = max(filter(None, shown), default=0.0)
    return "".join(
        " " if value is None else BARS[round(value / highest * (len(BARS) - 1)) if highest else 0] for value in shown
    )


def seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
