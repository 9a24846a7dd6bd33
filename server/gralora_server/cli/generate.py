"""`gralora generate`: one prompt, answered on standard output as it comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gralora_server.cli.options import Json
from gralora_server.cli.output import CommandError, ExitCode, print_json, stderr
from gralora_server.cli.remote import needs_server

if TYPE_CHECKING:
    from gralora_server.client import Client, Generation


@needs_server
def generate(
    client: Client,
    *,
    prompt: Annotated[str, typer.Argument(help="What to say to the model; - reads standard input.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            help="Default: the base model. NAME=WEIGHT, or several: the sum of their updates.",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message, before the prompt.")] = None,
    stream: Annotated[bool, typer.Option(help="Print text as it comes.")] = True,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of sequence.")] = False,
    json_schema: Annotated[
        Path | None, typer.Option(help="A file with the JSON schema that the answer matches.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="A regular expression that the answer matches.")] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="A text that the answer may be; may be given several times.")
    ] = None,
    request_id: Annotated[str, typer.Option(help="Default: the server makes one.")] = "",
    timeout_s: Annotated[float, typer.Option(min=0, help="Of the whole call.")] = 600.0,
    json: Json = False,
) -> None:
    """Generate text with the base model or an adapter.

    The prompt is one user's turn, through the model's chat template; --raw sends it as plain text instead.
    """
    if raw and system is not None:
        raise CommandError(ExitCode.USAGE, "--system needs the chat template, which --raw switches off")
    arguments: dict[str, Any] = {
        **_prompt(sys.stdin.read() if prompt == "-" else prompt, raw=raw, system=system),
        **_adapters(adapter or []),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
        "ignore_eos": ignore_eos,
        "request_id": request_id,
        "timeout_s": timeout_s,
        **_structure(json_schema=json_schema, regex=regex, choice=choice),
    }
    if json:
        print_json(client.generate(**arguments))
        return
    _report(_streamed(client, arguments) if stream else _at_once(client, arguments))


def _adapters(asked: list[str]) -> dict[str, Any]:
    if len(asked) <= 1 and not any("=" in one for one in asked):
        return {"adapter": "".join(asked)}
    return {"adapters": [_weighted(one) for one in asked]}


def _weighted(text: str) -> tuple[str, float]:
    """No name has an equals sign in it."""
    name, equals, weight = text.partition("=")
    try:
        return name, float(weight) if equals else 1.0
    except ValueError as cause:
        raise CommandError(ExitCode.USAGE, f"--adapter {text}: {weight!r} is no weight") from cause


def _prompt(text: str, *, raw: bool, system: str | None) -> dict[str, Any]:
    if raw:
        return {"prompt": text}
    turns = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*turns, {"role": "user", "content": text}]}


def _structure(*, json_schema: Path | None, regex: str | None, choice: list[str] | None) -> dict[str, Any]:
    if [json_schema, regex, choice or None].count(None) < 2:
        raise CommandError(ExitCode.USAGE, "give at most one of --json-schema, --regex and --choice")
    if json_schema is not None:
        return {"json_schema": _read(json_schema)}
    return {"regex": regex, "choice": choice or None}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise CommandError(ExitCode.USAGE, f"cannot read {file}: {cause}") from cause


def _at_once(client: Client, arguments: dict[str, Any]) -> Generation:
    generation = client.generate(**arguments)
    sys.stdout.write(generation.text + "\n")
    return generation


def _streamed(client: Client, arguments: dict[str, Any]) -> Generation:
    with client.stream(**arguments) as stream:
        for delta in stream:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return stream.generation


def _report(generation: Generation) -> None:
    digest = f" ({generation.adapter_digest[:12]})" if generation.adapter_digest else ""
    facts = [
        f"{generation.adapter or 'base model'}{digest}",
        f"{generation.usage.output_tokens} tokens in {generation.total_s:.2f} s",
        f"ended by {generation.finish_reason.value}",
    ]
    if generation.ttft_s is not None:
        facts.insert(2, f"the first after {generation.ttft_s:.2f} s")
    stderr().print(", ".join(facts), style="dim", markup=False, soft_wrap=True)
