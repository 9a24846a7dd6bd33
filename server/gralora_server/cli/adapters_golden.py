"""`gralora adapters golden`: answers that an adapter is known by, written beside its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gralora_server.cli.options import Json
from gralora_server.cli.output import print_json, stdout

if TYPE_CHECKING:
    from gralora_runtime.request import Prompt

DEFAULT_PROMPTS = ("Hello! Who are you?", "What is the capital of France?", "Tell me about the sea.", "Count to five.")


def golden(
    *,
    adapter: Annotated[Path, typer.Argument(help="An adapter directory; golden.json is written into it.")],
    model: Annotated[Path, typer.Option(help="The base model's directory.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Up to 16 may be given. Default: four of ours.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue prompts as they are, without the model's chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, max=64, help="Of each answer.")] = 16,
    json: Json = False,
) -> None:
    """Record what an adapter answers greedily, so that any server can be asked whether it answers the same.

    An engine is started in this process, with the adapter alone.
    """
    from gralora_runtime.adapters.checkpoint.golden import write_golden
    from gralora_runtime.adapters.checkpoint.header import GOLDEN_FILE
    from gralora_runtime.golden_answers import answer

    prompts = [_prompt(text, raw=raw) for text in prompt or DEFAULT_PROMPTS]
    found = answer(adapter, model, prompts, max_tokens=max_tokens)
    write_golden(adapter, found.golden, vocab_size=found.vocab_size)
    if json:
        print_json({"path": str(adapter / GOLDEN_FILE), "num_distinct": found.num_distinct, "golden": found.golden})
        return
    num_cases = len(found.golden.cases)
    line = f"{adapter / GOLDEN_FILE}: {num_cases} cases; the base model answers {found.num_distinct} of them otherwise"
    stdout().print(line, markup=False, soft_wrap=True)


def _prompt(text: str, *, raw: bool) -> Prompt:
    from gralora_runtime.request import ChatMessage, Prompt

    return Prompt(text=text) if raw else Prompt(messages=(ChatMessage("user", text),))
