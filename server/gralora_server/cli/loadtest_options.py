"""Options that `gralora loadtest` and `gralora loadtest compare` share, and the workload that they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gralora_server.cli.options import parse_bytes
from gralora_server.cli.output import CommandError, ExitCode

if TYPE_CHECKING:  # numpy takes a while to import, and `--help` does without it
    from gralora_server.loadtest.workload import Workload

WORKLOAD, USERS, MEASURE, OWN = "Workload", "Users", "Measuring", "Server of its own"

Arrivals = Annotated[
    str,
    typer.Option(
        help="poisson:RATE, gamma:RATE,CV, constant:RATE, burst:RATE,SIZE (requests a second), or closed:CLIENTS. "
        "step:RATE1,SECONDS1,RATE2,SECONDS2,... is poisson at rates that change; the last one goes on to the end.",
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
DeadlineS = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        help="Each call's timeout; part of the objective. Default: none.",
        rich_help_panel=USERS,
    ),
]
Retries = Annotated[
    int,
    typer.Option(
        min=0,
        help="Who is refused and told when to come again does so exactly then, so many times.",
        rich_help_panel=USERS,
    ),
]
PatienceS = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="... but not later than this after the request was due. Default: at any time.",
        rich_help_panel=USERS,
    ),
]
TenantsText = Annotated[
    str | None,
    typer.Option(
        "--tenants",
        help="NAME:SHARE,...: who sends which share of the requests. Or a TOML file with a table for each tenant: any "
        "of share, arrivals, popularity, prompt_tokens, output_tokens, adapters (globs), weight and token.",
        rich_help_panel=USERS,
    ),
]
TenantTokens = Annotated[
    Path | None,
    typer.Option(
        help="Lines of a tenant and its token, with a space between. Tenants without tokens get adapters of their own.",
        rich_help_panel=USERS,
    ),
]
Counts = Annotated[
    str, typer.Option(help="Numbers of adapters (customers), with commas between.", rich_help_panel=WORKLOAD)
]
Memory = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes,
        metavar="BYTES",
        help="Budget of a server. Default: four fifths of the machine's.",
        rich_help_panel=MEASURE,
    ),
]
Out = Annotated[
    Path, typer.Option(help="Directory for result.json, report.html and the plots.", rich_help_panel=MEASURE)
]


def parse_counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise CommandError(ExitCode.USAGE, f"--counts must be numbers with commas between, got {text!r}")
    return [int(part) for part in parts]


def memory_budget(wanted: int | None) -> int:
    """Bytes."""
    import psutil

    return wanted if wanted is not None else int(psutil.virtual_memory().total) * 4 // 5


def at_rate(arrivals: str, per_s: float) -> str:
    """The arrivals of `--arrivals`, whose kind is given without a rate: `gamma:2.5` at 4 a second is gamma:4,2.5."""
    kind, _, rest = arrivals.partition(":")
    return f"{kind}:{per_s:g}" + (f",{rest}" if rest else "")


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
) -> Workload:
    """What the options mean."""
    from gralora_server.loadtest.arrivals import parse_arrivals
    from gralora_server.loadtest.workload import Workload, parse_lengths, parse_popularity

    return Workload(
        arrivals=parse_arrivals(arrivals),
        adapters=names,
        popularity=parse_popularity(popularity),
        prompt=parse_lengths(prompt_tokens),
        output=parse_lengths(output_tokens),
        duration_s=duration_s,
        warmup_s=warmup_s,
        seed=seed,
    )
