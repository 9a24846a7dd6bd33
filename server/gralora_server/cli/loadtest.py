"""`gralora loadtest`: options to a workload and a target; then the run, its table and its report."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gralora_runtime.errors import ConfigError
from gralora_server.cli import compare
from gralora_server.cli.environment import offline_environment
from gralora_server.cli.loadtest_options import (
    MEASURE,
    OWN,
    WORKLOAD,
    Arrivals,
    DeadlineS,
    DurationS,
    Out,
    OutputTokens,
    PatienceS,
    PopularityText,
    PromptTokens,
    Retries,
    Seed,
    SloItlS,
    SloTtftS,
    TenantsText,
    TenantTokens,
    WarmupS,
    workload,
)
from gralora_server.cli.loadtest_output import report, result
from gralora_server.cli.options import Json
from gralora_server.cli.output import CommandError, ExitCode
from gralora_server.cli.progress import running
from gralora_server.cli.remote import failures_of, needs_connection

if TYPE_CHECKING:  # grpc and numpy take a while to import, and `--help` does without them
    from gralora_server.client.connection import Connection
    from gralora_server.loadtest.patience import Patience
    from gralora_server.loadtest.run import Target
    from gralora_server.loadtest.tenants import Tenants
    from gralora_server.loadtest.trace import Trace
    from gralora_server.loadtest.workload import Workload

app = typer.Typer(
    no_args_is_help=False, help="Drive a server with a load like that of your customers, and see what they get."
)
app.command("compare")(compare.compare)


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
            help="Use so many of the server's adapters, in alphabetical order; 0: the base model. With --tenants: so "
            "many for each. Default: all.",
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
    tenants: TenantsText = None,
    tenant_tokens: TenantTokens = None,
    deadline_s: DeadlineS = None,
    retries: Retries = 0,
    patience_s: PatienceS = None,
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
    from gralora_server.loadtest.patience import Patience
    from gralora_server.loadtest.run import run
    from gralora_server.loadtest.summary import Slo
    from gralora_server.loadtest.tenants import read_tenants
    from gralora_server.loadtest.trace import Trace

    slo = Slo(ttft_s=slo_ttft_s, itl_s=slo_itl_s)
    patience = Patience(deadline_s=deadline_s, retries=retries, total_s=patience_s)
    customers = read_tenants(tenants or "", tenant_tokens)
    described = {
        "arrivals": arrivals,
        "popularity": popularity,
        "prompt tokens": prompt_tokens,
        "output tokens": output_tokens,
        "duration": f"{duration_s:g} s, of them {warmup_s:g} s of warm-up",
        "seed": str(seed),
    }

    common = workload(
        arrivals=arrivals,
        popularity=popularity,
        names=(),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        duration_s=duration_s,
        warmup_s=warmup_s,
        seed=seed,
    )
    settings = customers.connection(settings)
    with (
        _target(settings, metrics_address, start=start, model=model, adapters=adapters) as target,
        failures_of(target.connection.target),
    ):
        sent = _drawn(target.connection, common, customers, num_adapters) if trace is None else Trace.read(trace)
        described = described if trace is None else {"trace": trace.name}
        described |= {f"tenant {name}": load.described for name, load in customers.loads.items()} | _asked(patience)
        if save_trace is not None:
            sent.write(save_trace)
        churn = Churn(names=_churned(sent), per_s=churn_per_s, seed=seed) if churn_per_s else None
        with running(system, sent.duration_s) as on_progress:
            done = asyncio.run(
                run(
                    replace(target, tokens=customers.tokens),
                    sent,
                    system=system,
                    label=system,
                    slo=slo,
                    churn=churn,
                    on_progress=on_progress,
                    patience=None if patience == Patience() else patience,
                    weights=customers.weights,
                )
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


def _drawn(connection: Connection, common: Workload, tenants: Tenants, most: int | None) -> Trace:
    if not tenants.loads:
        return replace(common, adapters=_names(connection, most)).trace()
    return tenants.trace(common, asyncio.run(tenants.adapters(connection, most)))


def _asked(patience: Patience) -> dict[str, str]:
    """Of what was asked for, as it is told."""
    said = {"deadline": patience.deadline_s, "patience": patience.total_s}
    return {name: f"{value:g} s" for name, value in said.items() if value is not None} | (
        {"retries": str(patience.retries)} if patience.retries else {}
    )


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
        target = Target.at(Connection(target=local.address), local.metrics_address)
        yield replace(target, memory_bytes=lambda: local.memory_bytes)


def serve_arguments(model: Path | None, adapters: Path | None) -> list[str]:
    """Of a server of ours: a free port, a metrics page, and nothing on the screen."""
    arguments = ["serve", "--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", "--log-level", "error"]
    if model is not None:
        arguments += ["--model", str(model)]
    if adapters is not None:
        arguments += ["--adapters", str(adapters)]
    return arguments
