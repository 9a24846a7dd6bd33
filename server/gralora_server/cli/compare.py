"""`gralora loadtest compare`: the same customers by one multi-adapter server and by merged models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gralora_server.cli.customers import customers
from gralora_server.cli.environment import offline_environment
from gralora_server.cli.loadtest_options import (
    MEASURE,
    OWN,
    Arrivals,
    Counts,
    DurationS,
    Memory,
    Out,
    OutputTokens,
    PopularityText,
    PromptTokens,
    Seed,
    SloItlS,
    SloTtftS,
    WarmupS,
    memory_budget,
    parse_counts,
    workload,
)
from gralora_server.cli.loadtest_output import report, result
from gralora_server.cli.model import default_model
from gralora_server.cli.options import Json, parse_bytes
from gralora_server.cli.output import CommandError, ExitCode, human_bytes
from gralora_server.cli.progress import running


def compare(
    *,
    counts: Counts = "1,4,16,64",
    systems: Annotated[
        str,
        typer.Option(
            help="multi: one multi-adapter server; turns: merged models in turn, all in memory; fleet: as many of them "
            "as fit the memory, others swapped in; ideal: one merged model for a single customer.",
            rich_help_panel=MEASURE,
        ),
    ] = "multi,turns,fleet,ideal",
    rounds: Annotated[
        int,
        typer.Option(min=1, help="So often, in turn; the report shows medians and ranges.", rich_help_panel=MEASURE),
    ] = 1,
    arrivals: Arrivals = "closed:16",
    popularity: PopularityText = "uniform",
    prompt_tokens: PromptTokens = "64",
    output_tokens: OutputTokens = "64",
    duration_s: DurationS = 25.0,
    warmup_s: WarmupS = 8.0,
    seed: Seed = 0,
    slo_ttft_s: SloTtftS = 4.0,
    slo_itl_s: SloItlS = 0.2,
    memory: Memory = None,
    warm: Annotated[
        bool,
        typer.Option(
            "--warm",
            help="The multi-adapter server first loads what it has room for, the likeliest last: as after long use.",
            rich_help_panel=MEASURE,
        ),
    ] = False,
    model: Annotated[Path | None, typer.Option(help="Default: SmolLM2-135M-Instruct.", rich_help_panel=OWN)] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(help="A directory of adapters, which come first; synthetic ones follow.", rich_help_panel=OWN),
    ] = None,
    kinds: Annotated[
        str,
        typer.Option(
            help="Of the synthetic adapters, in turn: r16k2, r8k4:q_proj+v_proj, ... They stay in $GRALORA_CACHE.",
            rich_help_panel=OWN,
        ),
    ] = "r16k2",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests in one step.", rich_help_panel=OWN)] = 16,
    kv_cache: Annotated[
        int, typer.Option(parser=parse_bytes, metavar="BYTES", help="Of each system.", rich_help_panel=OWN)
    ] = parse_bytes("2GiB"),
    out: Out = Path("gralora-loadtest"),
    json: Json = False,
) -> None:
    """Serve the same customers by one multi-adapter server and by merged models, and compare.

    Starts each system in turn on this machine, sends all of them the same requests, and writes one report.
    """
    from gralora_server.loadtest.compare import SYSTEMS, Comparison
    from gralora_server.loadtest.summary import Slo

    chosen = systems.split(",")
    if unknown := set(chosen) - SYSTEMS.keys():
        raise CommandError(ExitCode.USAGE, f"--systems has {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    wanted = parse_counts(counts)
    served = model if model is not None else default_model()
    folder, names = customers(served, adapters, kinds, max(wanted))
    comparison = Comparison(
        model=served,
        adapters=folder,
        names=names,
        trace=lambda names: workload(
            arrivals=arrivals,
            popularity=popularity,
            names=names,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            duration_s=duration_s,
            warmup_s=warmup_s,
            seed=seed,
        ).trace(),
        slo=Slo(ttft_s=slo_ttft_s, itl_s=slo_itl_s),
        memory_bytes=memory_budget(memory),
        warm=warm,
        max_num_seqs=max_num_seqs,
        kv_cache_bytes=kv_cache,
        environment=offline_environment(),
        progress=running,
    )
    described = {
        "model": served.name,
        "arrivals": arrivals,
        "popularity": popularity,
        "prompt tokens": prompt_tokens,
        "output tokens": output_tokens,
        "each run": f"{duration_s:g} s, of them {warmup_s:g} s of warm-up",
        "seed": str(seed),
        "adapters": f"{kinds} (synthetic)"
        if adapters is None
        else f"those of {adapters.name}, then {kinds} (synthetic)",
        "memory budget": human_bytes(comparison.memory_bytes),
        "adapters at the start": "in memory, as many as fit" if warm else "on disk",
        "KV cache of each system": human_bytes(kv_cache),
        "requests in one step, at most": str(max_num_seqs),
        "rounds": str(rounds),
    }
    found = result("Many customers: one multi-adapter server beside merged models", described, [])
    out.mkdir(parents=True, exist_ok=True)
    for outcome in comparison.run(chosen, wanted, rounds):
        found = found.adding(outcome)
        found.write(out / "result.json")  # what was measured stays, whatever becomes of the rest
    report(found, out, as_json=json)
