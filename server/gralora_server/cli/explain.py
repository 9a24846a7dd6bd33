"""`gralora explain`: where a request's time went, as a waterfall and in two sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from gralora_server.cli.options import Json
from gralora_server.cli.output import CommandError, ExitCode, human_bytes, print_json, stdout
from gralora_server.cli.remote import needs_server

if TYPE_CHECKING:
    from gralora_server.client import Client, Explanation, ExplanationPart

WIDTH = 40  # of the bars, in characters
EIGHTHS = " ▏▎▍▌▋▊▉"


@needs_server
def explain(
    client: Client, request_id: Annotated[str, typer.Argument(help="As the answer says it.")], *, json: Json = False
) -> None:
    """Show where the time of a recent request went, and what would have helped."""
    found = client.explain(request_id)
    if found is None:
        raise CommandError(ExitCode.FAILED, f"no recent request is called {request_id!r}")
    if json:
        print_json(asdict(found))
        return
    console = stdout()
    console.print(Text(_heading(found)))
    console.print(_waterfall(found))
    console.print(Text(found.says, style="bold"))
    console.print(Text(f"What would have helped: {found.advice}"))


def _heading(found: Explanation) -> str:
    first = f", the first token after {_ms(found.first_token_s)}" if found.first_token_s is not None else ""
    tokens = f"{found.prompt_tokens} + {found.output_tokens} tokens"
    ended = found.outcome or "it runs"
    return f"{found.request_id}: {found.adapter or 'the base model'}, {tokens}, {_ms(found.total_s)}{first}; {ended}"


def _waterfall(found: Explanation) -> Table:
    table = Table(box=None)
    for column, side in (("stage", "left"), ("ms", "right"), ("", "left"), ("", "left")):
        table.add_column(column, justify="right" if side == "right" else "left", no_wrap=column != "")
    for part in found.parts:
        name = f"{part.stage} {part.station}".strip()
        bar = _bar(part.start_s, part.duration_s, found.total_s)
        table.add_row(Text(name), f"{part.duration_s * 1000:.1f}", Text(bar, style="cyan"), Text(_details(part)))
    return table


def _bar(start_s: float, duration_s: float, total_s: float) -> str:
    """To an eighth of a character where it ends; never nothing."""
    scale = WIDTH / max(total_s, 1e-9)
    begin = min(int(start_s * scale), WIDTH - 1)
    whole, eighths = divmod(round((start_s + duration_s) * scale * 8) - begin * 8, 8)
    return " " * begin + ("█" * whole + EIGHTHS[eighths].strip() or EIGHTHS[1])


def _details(part: ExplanationPart) -> str:
    return "; ".join(_facts(part))


def _facts(part: ExplanationPart) -> Iterator[str]:
    if part.num_bytes:
        yield human_bytes(part.num_bytes)
    yield from (f"{one.by} {_ms(one.duration_s)}" for one in part.held_up)
    if part.ahead or part.own_ahead:
        yield f"{part.ahead} of others and {part.own_ahead} of its own tenant were first"
    if part.lacks_for:
        yield f"{part.lacks_for} has the {part.lacks}"
    if part.chunks:
        yield f"{sum(chunk.tokens for chunk in part.chunks)} tokens, chunks: {len(part.chunks)}"
    if part.steps:
        yield f"{part.steps} steps of {part.mean_rows:.1f} requests"
    if part.prompt_steps:
        yield f"{part.prompt_steps} of them with prompts, {_ms(part.prompt_steps_s)}"
    pause = part.longest_pause
    if pause is not None:
        beside = f" beside {pause.prompt_tokens} tokens of {pause.prompt_of}" if pause.prompt_tokens else ""
        yield f"longest pause {_ms(pause.duration_s)}{beside}"


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
