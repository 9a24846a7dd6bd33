"""`gralora plan`: how many adapters, at what rate, this machine serves within an objective."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from gralora_runtime.config import EngineConfig
from gralora_server.cli.customers import customers, own_names
from gralora_server.cli.environment import offline_environment
from gralora_server.cli.loadtest_options import (
    MEASURE,
    OWN,
    WORKLOAD,
    Counts,
    Memory,
    OutputTokens,
    PopularityText,
    PromptTokens,
    Seed,
    SloItlS,
    SloTtftS,
    at_rate,
    memory_budget,
    parse_counts,
    workload,
)
from gralora_server.cli.loadtest_output import report, result, write
from gralora_server.cli.model import default_model
from gralora_server.cli.options import Json
from gralora_server.cli.output import human_bytes, print_json, stdout
from gralora_server.cli.plan_profile import profile_of
from gralora_server.cli.progress import running
from gralora_server.settings.values import default_of

if TYPE_CHECKING:  # torch and numpy take a while to import, and `--help` does without them
    from gralora_server.loadtest.trace import Trace
    from gralora_server.planner.search import Planned, Planner

# A check sends less than what is possible at most: beside the limit every queue explodes at the least error.
CHECKED_SHARE, CHECK_S, CHECK_WARMUP_S = 0.8, 45.0, 10.0


def plan(
    *,
    counts: Counts = "16,64,250,1000",
    rate_per_adapter: Annotated[
        float | None,
        typer.Option(min=0, help="Requests a second of each: say also how many fit at it.", rich_help_panel=WORKLOAD),
    ] = None,
    arrivals: Annotated[
        str, typer.Option(help="poisson, gamma:CV, constant or burst:SIZE.", rich_help_panel=WORKLOAD)
    ] = "poisson",
    popularity: PopularityText = "zipf:1.0",
    prompt_tokens: PromptTokens = "64",
    output_tokens: OutputTokens = "64",
    seed: Seed = 0,
    slo_ttft_s: SloTtftS = 2.0,
    slo_itl_s: SloItlS = 0.2,
    slo_share: Annotated[
        float, typer.Option(min=0, max=1, help="... for this share of the requests.", rich_help_panel=MEASURE)
    ] = 0.95,
    memory: Memory = None,
    model: Annotated[Path | None, typer.Option(help="Default: SmolLM2-135M-Instruct.", rich_help_panel=OWN)] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="The mix: adapters like those in this directory.", rich_help_panel=OWN)
    ] = None,
    kinds: Annotated[
        str,
        typer.Option(help="The mix without a directory, and what is made up to measure.", rich_help_panel=OWN),
    ] = "r16k2",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests in one step.", rich_help_panel=OWN)] = default_of(
        EngineConfig, "max_num_seqs"
    ),
    profile: Annotated[
        Path | None,
        typer.Option(
            help="What steps cost: read if the file is there, measured and written otherwise (two minutes). "
            "Default: a file of this machine in $GRALORA_CACHE.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Send the traffic to a real server and report the error.", rich_help_panel=MEASURE
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Directory for the check's report.", rich_help_panel=MEASURE)] = Path(
        "gralora-plan"
    ),
    json: Json = False,
) -> None:
    """Say how many adapters, at what rate, meet an objective on this machine.

    From the adapters' headers, the memory, and a profile of what steps cost here.
    """
    from gralora_server.loadtest.summary import Slo
    from gralora_server.loadtest.workload import parse_lengths
    from gralora_server.planner.check import Check
    from gralora_server.planner.mix import adapter_bytes
    from gralora_server.planner.search import Planner

    wanted, served = parse_counts(counts), model if model is not None else default_model()
    folder, names = customers(served, adapters, kinds, max_num_seqs)
    measured = profile_of(profile, served, folder, names, max_num_seqs)

    def drawn(arrivals: str, names: Sequence[str], warmup_s: float, duration_s: float) -> Trace:
        return workload(
            arrivals=arrivals,
            popularity=popularity,
            names=names,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            duration_s=duration_s,
            warmup_s=warmup_s,
            seed=seed,
        ).trace()

    planner = Planner(
        profile=measured,
        mix=adapter_bytes(served, folder, own_names(adapters) or names),
        trace=lambda names, rate, warmup_s, duration_s: drawn(at_rate(arrivals, rate), names, warmup_s, duration_s),
        slo=Slo(ttft_s=slo_ttft_s, itl_s=slo_itl_s),
        slo_share=slo_share,
        memory_bytes=memory_budget(memory),
        host_cache_bytes=default_of(EngineConfig, "host_cache_bytes"),
        max_adapter_slots=default_of(EngineConfig, "max_adapter_slots"),
        request_tokens=parse_lengths(prompt_tokens).high + parse_lengths(output_tokens).high,
    )
    plans = [planner.highest_rate(count) for count in wanted]
    most = planner.most_adapters(rate_per_adapter) if rate_per_adapter else None
    checked = []
    if check:
        folder, names = customers(served, adapters, kinds, max(wanted))
        sizes = adapter_bytes(served, folder, names)
        checks = Check(
            planner=planner, model=served, adapters=folder, environment=offline_environment(), progress=running
        )
        loads = [
            (planned.num_adapters, at_rate(arrivals, CHECKED_SHARE * planned.rate_per_s))
            for planned in plans
            if planned.rate_per_s
        ]
        # And more than can be served: what the throughput is then.
        for count, load in [*loads, (max(wanted), f"closed:{max_num_seqs}")]:
            asked = dict(islice(sizes.items(), count))
            checked.append(
                checks.run(f"{count} adapters, {load}", asked, drawn(load, list(asked), CHECK_WARMUP_S, CHECK_S))
            )
    described = {
        "model": served.name,
        "adapters": measured.adapters,
        "arrivals": f"{arrivals}, {CHECKED_SHARE:.0%} of the highest rate planned; then a closed loop",
        "popularity": popularity,
        "prompt tokens": prompt_tokens,
        "output tokens": output_tokens,
        "each run": f"{CHECK_S:g} s, of them {CHECK_WARMUP_S:g} s of warm-up",
        "seed": str(seed),
        "profile measured": measured.made_at,
    }
    found = result("Plan and measurement", described, checked)
    if json:
        documents = [_document(planned, planner) for planned in plans]
        fitting = None if most is None else _document(most, planner)
        checks_said = [run.model_dump(mode="json") for run in checked]
        print_json(
            {
                "profile": measured.model_dump(mode="json"),
                "plans": documents,
                "most_adapters": fitting,
                "checks": checks_said,
            }
        )
        if checked:
            write(found, out)
        return
    _print(plans, most, rate_per_adapter, planner)
    if checked:
        report(found, out, as_json=False)


def _document(planned: Planned, planner: Planner) -> dict[str, object]:
    from gralora_server.planner.check import serve_options

    return {
        "num_adapters": planned.num_adapters,
        "requests_per_s": planned.rate_per_s,
        "memory_bytes": planned.memory_bytes,
        "adapter_pool_bytes": planned.server.adapter_pool_bytes,
        "loads_per_request": planned.loads_per_request,
        "summary": planned.summary.model_dump(mode="json"),
        "serve": serve_options(planner, planned.server),
    }


def _print(plans: Sequence[Planned], most: Planned | None, rate_per_adapter: float | None, planner: Planner) -> None:
    from gralora_server.planner.check import serve_options

    profile, slo = planner.profile, planner.slo
    stdout().print(
        f"{profile.model} on {profile.machine['CPU']}, {profile.machine['cores']} cores (measured {profile.made_at}): "
        f"the highest rate at which {planner.slo_share:.0%} of the requests have their first token within "
        f"{slo.ttft_s:g} s and then at most {1000 * slo.itl_s:g} ms a token",
        markup=False,
    )
    stdout().print(_table(plans))
    if rate_per_adapter is not None:
        fit = (
            "none fits" if most is None else f"{most.num_adapters} adapters fit ({most.rate_per_s:.3g} a second in all)"
        )
        stdout().print(f"At {rate_per_adapter:g} requests a second for each adapter {fit}.", markup=False)
    options = " ".join(serve_options(planner, (most or plans[-1]).server))
    stdout().print(f"Such a server: gralora serve {options}", markup=False, soft_wrap=True)


def _table(plans: Sequence[Planned]) -> Table:
    table = Table(
        "adapters", "requests/s", "tokens/s", "TTFT p50", "p99", "ITL p50", "p99", "in the pool", "loads", "memory"
    )
    for column in table.columns:
        column.justify = "right"
    for planned in plans:
        summary = planned.summary
        figures = [summary.ttft_s.p50, summary.ttft_s.p99, summary.itl_s.p50, summary.itl_s.p99]
        times = [f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms" for value in figures]
        served = (
            [f"{planned.rate_per_s:.3g}", f"{summary.tokens_per_s:.0f}", *times]
            if planned.rate_per_s
            else ["none", *[""] * 5]
        )
        pool, loads = human_bytes(planned.server.adapter_pool_bytes), f"{planned.loads_per_request:.0%}"
        table.add_row(str(planned.num_adapters), *served, pool, loads, human_bytes(planned.memory_bytes))
    return table
