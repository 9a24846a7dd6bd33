"""`gralora loadtest`: options to a workload and a target; then the run, its table and its report."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING, Annotated

import typer

from gralora_runtime.errors import ConfigError
from gralora_server.cli.environment import cache_dir, offline_environment
from gralora_server.cli.model import default_model
from gralora_server.cli.options import Json, parse_bytes
from gralora_server.cli.output import CommandError, ExitCode, human_bytes, print_json, stderr, stdout
from gralora_server.cli.progress import running
from gralora_server.cli.remote import failures_of, needs_connection

if TYPE_CHECKING:  # grpc, numpy and matplotlib take a while to import, and `--help` does without them
    from gralora_server.client.connection import Connection
    from gralora_server.loadtest.result import LoadTestResult, RunResult
    from gralora_server.loadtest.run import Target
    from gralora_server.loadtest.trace import Trace

WORKLOAD, MEASURE, OWN = "Workload", "Measuring", "Server of its own"

Arrivals = Annotated[
    str,
    typer.Option(
        help="poisson:RATE, gamma:RATE,CV, constant:RATE, burst:RATE,SIZE (requests a second), or closed:CLIENTS.",
        rich_help_panel=WORKLOAD,
    ),
]
PopularityText = Annotated[
    str,
    typer.Option(
        help="Which adapter a request is for: uniform, zipf:ALPHA, hot-set:COUNT,SHARE or identical.",
        rich_help_panel=WORKLOAD,
    ),
]
PromptTokens = Annotated[
    str, typer.Option(help="Tokens: N, LOW-HIGH, or lognormal:MEDIAN,SIGMA,MAX.", rich_help_panel=WORKLOAD)
]
OutputTokens = Annotated[str, typer.Option(help="The same; the end of sequence is ignored.", rich_help_panel=WORKLOAD)]
DurationS = Annotated[
    float, typer.Option(min=0.1, help="Requests are sent so long, warm-up included.", rich_help_panel=WORKLOAD)
]
WarmupS = Annotated[float, typer.Option(min=0, help="Not counted.", rich_help_panel=WORKLOAD)]
Seed = Annotated[int, typer.Option(min=0, help="The same seed sends the same requests.", rich_help_panel=WORKLOAD)]
SloTtftS = Annotated[
    float, typer.Option(min=0, help="Goodput: the first token comes within it ...", rich_help_panel=MEASURE)
]
SloItlS = Annotated[
    float, typer.Option(min=0, help="... and the mean time between tokens is at most this.", rich_help_panel=MEASURE)
]
Out = Annotated[
    Path, typer.Option(help="Directory for result.json, report.html and the plots.", rich_help_panel=MEASURE)
]

app = typer.Typer(
    no_args_is_help=False, help="Drive a server with a load like that of your customers, and see what they get."
)


@app.callback(invoke_without_command=True)
@needs_connection
def loadtest(
    settings: Connection,
    *,
    context: typer.Context,
    arrivals: Arrivals = "poisson:2",
    popularity: PopularityText = "uniform",
    num_adapters: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Use so many of the server's adapters, in alphabetical order; 0: the base model. Default: all.",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    prompt_tokens: PromptTokens = "64",
    output_tokens: OutputTokens = "64",
    duration_s: DurationS = 30.0,
    warmup_s: WarmupS = 5.0,
    seed: Seed = 0,
    trace: Annotated[
        Path | None,
        typer.Option(help="Send this trace instead of drawing one from the options above.", rich_help_panel=WORKLOAD),
    ] = None,
    save_trace: Annotated[
        Path | None, typer.Option(help="Write what is sent, as JSON lines.", rich_help_panel=WORKLOAD)
    ] = None,
    churn_per_s: Annotated[
        float,
        typer.Option(
            min=0,
            help="Unload an adapter and load it again, so often (needs an admin's token).",
            rich_help_panel=WORKLOAD,
        ),
    ] = 0.0,
    slo_ttft_s: SloTtftS = 2.0,
    slo_itl_s: SloItlS = 0.2,
    metrics_address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of the server's metrics page, to explain the figures.", rich_help_panel=MEASURE),
    ] = None,
    system: Annotated[str, typer.Option(help="What the report calls the server.", rich_help_panel=MEASURE)] = "server",
    out: Out = Path("gralora-loadtest"),
    start: Annotated[
        bool, typer.Option("--start", help="Start a server for the run instead.", rich_help_panel=OWN)
    ] = False,
    model: Annotated[
        Path | None, typer.Option(help="Of the started server. Default: SmolLM2-135M-Instruct.", rich_help_panel=OWN)
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="Of the started server: the adapters' directory.", rich_help_panel=OWN)
    ] = None,
    json: Json = False,
) -> None:
    """Drive a server and report what its customers get: delays, throughput, goodput, fairness.

    Requests are sent when they are due, whatever became of those before, and delays count from then.
    """
    if context.invoked_subcommand is not None:
        return
    from gralora_server.loadtest.churn import Churn
    from gralora_server.loadtest.run import run
    from gralora_server.loadtest.summary import Slo
    from gralora_server.loadtest.trace import Trace

    slo = Slo(ttft_s=slo_ttft_s, itl_s=slo_itl_s)
    described = {
        "arrivals": arrivals,
        "popularity": popularity,
        "prompt tokens": prompt_tokens,
        "output tokens": output_tokens,
        "duration": f"{duration_s:g} s, of them {warmup_s:g} s of warm-up",
        "seed": str(seed),
    }

    def drawn(names: Sequence[str]) -> Trace:
        return workload(
            arrivals=arrivals,
            popularity=popularity,
            names=names,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            duration_s=duration_s,
            warmup_s=warmup_s,
            seed=seed,
        )

    with (
        _target(settings, metrics_address, start=start, model=model, adapters=adapters) as target,
        failures_of(target.connection.target),
    ):
        names = _names(target.connection, num_adapters)
        sent = drawn(names) if trace is None else Trace.read(trace)
        if trace is not None:
            described = {"trace": trace.name}
        if save_trace is not None:
            sent.write(save_trace)
        churn = Churn(names=_churned(sent), per_s=churn_per_s, seed=seed) if churn_per_s else None
        with running(system, sent.duration_s) as on_progress:
            done = asyncio.run(
                run(target, sent, system=system, label=system, slo=slo, churn=churn, on_progress=on_progress)
            )
    if churn_per_s:
        described["churn"] = f"{churn_per_s:g} adapters a second"
    report(result("Load test", described, [done]), out, as_json=json)


@app.command("report")
def report_results(
    results: Annotated[list[Path], typer.Argument(help="result.json of one or more runs.")],
    *,
    out: Out = Path("gralora-loadtest"),
    json: Json = False,
) -> None:
    """Write the report of one result, or one comparison of several."""
    from gralora_server.loadtest.report import merge
    from gralora_server.loadtest.result import LoadTestResult

    read = [LoadTestResult.read(path) for path in results]
    report(read[0] if len(read) == 1 else merge(read), out, as_json=json)


@app.command("compare")
def compare_deployments(
    *,
    counts: Annotated[
        str, typer.Option(help="Numbers of adapters (customers), with commas between.", rich_help_panel=WORKLOAD)
    ] = "1,4,16,64",
    systems: Annotated[
        str,
        typer.Option(
            help="multi: one multi-adapter server; turns: merged models in turn, all in memory; fleet: as many of them "
            "as fit the memory, others swapped in; ideal: one merged model for a single customer.",
            rich_help_panel=MEASURE,
        ),
    ] = "multi,turns,fleet,ideal",
    arrivals: Arrivals = "closed:16",
    popularity: PopularityText = "uniform",
    prompt_tokens: PromptTokens = "64",
    output_tokens: OutputTokens = "64",
    duration_s: DurationS = 25.0,
    warmup_s: WarmupS = 8.0,
    seed: Seed = 0,
    slo_ttft_s: SloTtftS = 4.0,
    slo_itl_s: SloItlS = 0.2,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="BYTES",
            help="Budget of each system. Default: four fifths of the machine's.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
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
    import psutil

    from gralora_server.loadtest.compare import SYSTEMS, Comparison
    from gralora_server.loadtest.summary import Slo

    chosen = systems.split(",")
    if unknown := set(chosen) - SYSTEMS.keys():
        raise CommandError(ExitCode.USAGE, f"--systems has {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    wanted = _counts(counts)
    served = model if model is not None else default_model()
    folder, names = _customers(served, adapters, kinds, max(wanted))
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
        ),
        slo=Slo(ttft_s=slo_ttft_s, itl_s=slo_itl_s),
        memory_bytes=memory if memory is not None else psutil.virtual_memory().total * 4 // 5,
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
        "KV cache of each system": human_bytes(kv_cache),
        "requests in one step, at most": str(max_num_seqs),
    }
    found = result("Many customers: one multi-adapter server beside merged models", described, [])
    out.mkdir(parents=True, exist_ok=True)
    for outcome in comparison.run(chosen, wanted):
        found = found.adding(outcome)
        found.write(out / "result.json")  # what was measured stays, whatever becomes of the rest
    report(found, out, as_json=json)


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise CommandError(ExitCode.USAGE, f"--counts must be numbers with commas between, got {text!r}")
    return [int(part) for part in parts]


def _customers(model: Path, own: Path | None, kinds: str, count: int) -> tuple[Path, list[str]]:
    """A directory with at least `count` adapters, and their names in alphabetical order. What was made stays there."""
    from gralora_server.loadtest.headers import shapes_digest
    from gralora_server.loadtest.synthetic import make_adapters, parse_kinds

    kept = re.sub(r"[^\w.]+", "-", kinds if own is None else f"{own.name}-{kinds}")
    folder = cache_dir() / "loadtest-adapters" / shapes_digest(model) / kept
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for adapter in [] if own is None else sorted(own.iterdir()):
        if (adapter / "adapter_config.json").is_file():
            copytree(adapter, folder / adapter.name, dirs_exist_ok=True)
            names.append(adapter.name)
    made = make_adapters(model, folder, parse_kinds(kinds), max(0, count - len(names)))
    return folder, sorted([*names, *made])[:count]


def workload(
    *,
    arrivals: str,
    popularity: str,
    names: Sequence[str],
    prompt_tokens: str,
    output_tokens: str,
    duration_s: float,
    warmup_s: float,
    seed: int,
) -> Trace:
    """The trace that the options mean."""
    from gralora_server.loadtest.workload import Workload, parse_arrivals, parse_lengths, parse_popularity

    return Workload(
        arrivals=parse_arrivals(arrivals),
        adapters=names,
        popularity=parse_popularity(popularity),
        prompt=parse_lengths(prompt_tokens),
        output=parse_lengths(output_tokens),
        duration_s=duration_s,
        warmup_s=warmup_s,
        seed=seed,
    ).trace()


def result(title: str, described: dict[str, str], runs: Sequence[RunResult]) -> LoadTestResult:
    from gralora_server.loadtest.machine import facts
    from gralora_server.loadtest.result import LoadTestResult

    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    return LoadTestResult(title=title, made_at=made_at, machine=facts(), workload=described, runs=tuple(runs))


def report(found: LoadTestResult, out: Path, *, as_json: bool) -> None:
    """Write everything, and print the table."""
    from gralora_server.loadtest.report import write_report

    out.mkdir(parents=True, exist_ok=True)
    found.write(out / "result.json")
    page = write_report(found, out)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    stdout().print(_table(found.runs))
    for refusal in found.refusals:
        stdout().print(f"{refusal.system}, {refusal.num_adapters} adapters: {refusal.why}", markup=False)
    for run in found.runs:
        if run.summary.generator.limited:
            stderr().print(
                f"{run.summary.label}: the generator was the bottleneck; its figures say little.", style="red"
            )
    stdout().print(f"Report: {page}", markup=False, soft_wrap=True)


def _table(runs: Sequence[RunResult]) -> object:
    from rich.table import Table

    table = Table(
        "", "adapters", "requests", "errors", "tokens/s", "TTFT p50", "p99", "ITL p50", "p99", "SLO met", "Jain"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_column("memory", justify="right")
    for run in runs:
        summary = run.summary
        table.add_row(
            summary.label,
            str(run.num_adapters),
            str(summary.requests),
            str(sum(summary.errors.values())),
            f"{summary.tokens_per_s:.1f}",
            f"{summary.ttft_s.p50:.2f} s",
            f"{summary.ttft_s.p99:.2f} s",
            f"{1000 * summary.itl_s.p50:.0f} ms",
            f"{1000 * summary.itl_s.p99:.0f} ms",
            f"{summary.goodput_share:.0%}",
            f"{summary.fairness.jain:.3f}",
            "" if run.memory_bytes is None else human_bytes(run.memory_bytes),
        )
    return table


def _names(connection: Connection, wanted: int | None) -> list[str]:
    from gralora_server.loadtest.run import adapter_names

    names = asyncio.run(adapter_names(connection))
    if wanted is not None and wanted > len(names):
        raise ConfigError(f"--num-adapters is {wanted}, but the server has {len(names)}")
    return names[:wanted]


def _churned(trace: Trace) -> tuple[str, ...]:
    if not trace.adapters:
        raise ConfigError("--churn-per-s needs requests for adapters, but all are for the base model")
    return trace.adapters


@contextmanager
def _target(
    settings: Connection, metrics_address: str | None, *, start: bool, model: Path | None, adapters: Path | None
) -> Iterator[Target]:
    from gralora_server.client.connection import Connection
    from gralora_server.loadtest.local_server import running as server
    from gralora_server.loadtest.run import Target

    if not start:
        if model is not None or adapters is not None:
            raise CommandError(ExitCode.USAGE, "--model and --adapters are those of a server of its own: add --start")
        yield Target.at(settings, metrics_address)
        return
    with server(serve_arguments(model, adapters), offline_environment()) as local:
        yield Target.at(Connection(target=local.address), local.metrics_address)


def serve_arguments(model: Path | None, adapters: Path | None) -> list[str]:
    """Of a server of ours: a free port, a metrics page, and nothing on the screen."""
    arguments = ["serve", "--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", "--log-level", "error"]
    if model is not None:
        arguments += ["--model", str(model)]
    if adapters is not None:
        arguments += ["--adapters", str(adapters)]
    return arguments
