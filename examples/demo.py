"""The main job, end to end: ten customers' adapters and the base model, one server, one batch, PEFT's tokens.

    python examples/demo.py [--model DIR]

Exits with 1 if any answer differs from PEFT's, or if an adapter coming and going changes what others are told.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from personas import PERSONAS
from rich.console import Console
from rich.table import Table

from gralora_kernels.stages import StartStage
from gralora_server import AsyncClient
from gralora_server.cli.progress import showing
from gralora_server.client import Adapter, Generation

if TYPE_CHECKING:
    from peft_oracle import Comparison

GRALORA = str(Path(sys.executable).with_name("gralora"))
ADAPTERS_DIR = Path(__file__).parent / "adapters"
QUESTION = "What is the capital of France?"
MAX_TOKENS = 64
NEWCOMER = "newcomer"
START_TIMEOUT_S = 180.0

console = Console(width=max(100, Console().width))


@dataclass(frozen=True, slots=True)
class Visit:
    """What happened while an adapter was loaded, used and unloaded beside running streams."""

    load_s: float
    answer: str
    pool_bytes_freed: int
    largest_gap_s: float  # between two messages of any stream meanwhile
    unchanged: bool  # the streams said what they say when nobody comes or goes


@dataclass(frozen=True, slots=True)
class Session:
    """Everything that the server answered."""

    prompt_token_ids: tuple[int, ...]
    adapters: dict[str, Adapter]
    together: dict[str, Generation]
    together_s: float
    one_by_one_s: float
    visit: Visit


def main() -> int:
    """Serve, ask, compare, print; the process's exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model directory; default: the one of `gralora model fetch`")
    model = parser.parse_args().model or fetch_model()
    console.print(
        "[bold]2 of 4[/] Starting `gralora serve`; the first time it compiles its kernels, a quarter of a minute."
    )
    with tempfile.TemporaryDirectory() as folder:
        adapters_dir = Path(shutil.copytree(ADAPTERS_DIR, Path(folder) / "adapters"))
        started_s = time.perf_counter()
        with serving(model, adapters_dir) as address:
            console.print(f"Server ready after {time.perf_counter() - started_s:.1f} s at {address}.")
            console.print("[bold]3 of 4[/] Asking the base model and ten adapters.")
            with showing(console.print) as stage:
                session = asyncio.run(converse(address, adapters_dir, stage))
    console.print("[bold]4 of 4[/] Comparing every answer with what PEFT says.")
    with showing(console.print) as stage:
        verdicts = compare_with_peft(model, session, stage)
    print_session(session, verdicts)
    good = session.visit.unchanged and all(verdict.equal for verdict in verdicts.values())
    console.print("[bold green]Every answer is PEFT's." if good else "[bold red]Answers differ.")
    return 0 if good else 1


def fetch_model() -> Path:
    """The default model's directory, made on first use."""
    console.print("[bold]1 of 4[/] The base model, SmolLM2-135M; the first time it is converted, half a minute.")
    command = [GRALORA, "model", "fetch", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return Path(json.loads(done.stdout)["path"])


@contextlib.contextmanager
def serving(model: Path, adapters_dir: Path) -> Iterator[str]:
    """`gralora serve` in a process of its own, as a user would start it; yields its address."""
    # On a terminal it shows what it is doing whatever it logs.
    command = [GRALORA, "serve", "--log-level", "warning" if console.is_terminal else "info", "--json"]
    options = ["--model", model, "--adapters", adapters_dir, "--address", "127.0.0.1:0"]
    with subprocess.Popen([*command, *map(str, options)], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start: exit code {server.wait(START_TIMEOUT_S)}")
            yield json.loads(line)["address"]
        finally:
            server.terminate()


async def converse(address: str, adapters_dir: Path, stage: StartStage) -> Session:
    """Ask everybody at once, then one after another, then let an adapter come and go beside three streams."""
    messages = [{"role": "user", "content": QUESTION}]
    async with AsyncClient(address) as client:
        adapters = {adapter.name: adapter for adapter in await client.adapters.list()}
        names = ["", *(persona.name for persona in PERSONAS)]

        async def ask(name: str) -> Generation:
            return await client.stream(
                messages=messages, adapter=name, max_tokens=MAX_TOKENS, temperature=0.0, echo_prompt_token_ids=True
            ).read()

        with stage("All at once, and every adapter loaded for it"):  # so that timed rounds compare computing alone
            await asyncio.gather(*map(ask, names))
        with stage("All at once again"):
            started_s = time.perf_counter()
            together = dict(zip(names, await asyncio.gather(*map(ask, names)), strict=True))
            together_s = time.perf_counter() - started_s
        with stage("One after the other") as tell:
            started_s = time.perf_counter()
            for done, name in enumerate(names):
                tell(done=done, total=len(names))
                await ask(name)
            one_by_one_s = time.perf_counter() - started_s
        adapters = {adapter.name: adapter for adapter in await client.adapters.list()}
        with stage("An adapter comes and goes while three others answer"):
            visit = await come_and_go(client, messages, together, adapters_dir)
    return Session(together[""].prompt_token_ids, adapters, together, together_s, one_by_one_s, visit)


async def come_and_go(
    client: AsyncClient,
    messages: Sequence[dict[str, str]],
    expected: dict[str, Generation],
    adapters_dir: Path,
) -> Visit:
    """Load, use and unload a new adapter while three others stream."""
    gaps: list[float] = []
    arrived = asyncio.Event()

    async def stream(name: str) -> bool:
        tokens: list[int] = []
        async for _, delta_tokens in timed(client, messages, name, gaps):
            tokens += delta_tokens
            arrived.set()
        return tuple(tokens[: len(expected[name].token_ids)]) == expected[name].token_ids

    streams = [asyncio.create_task(stream(name)) for name in ("", PERSONAS[1].name, PERSONAS[2].name)]
    await arrived.wait()
    write_newcomer(adapters_dir)
    started_s = time.perf_counter()
    await client.adapters.load(NEWCOMER)
    load_s = time.perf_counter() - started_s
    answer = await client.generate(messages=messages, adapter=NEWCOMER, max_tokens=24, temperature=0.0)
    freed = await client.adapters.unload(NEWCOMER)
    unchanged = all(await asyncio.gather(*streams))
    return Visit(load_s, answer.text, freed.pool_bytes_freed, max(gaps), unchanged)


def write_newcomer(adapters_dir: Path) -> None:
    """A customer's adapter that the server has never seen: an example's weights at another scale."""
    folder = Path(shutil.copytree(adapters_dir / PERSONAS[0].name, adapters_dir / NEWCOMER))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alpha"] *= 1.25
    (folder / "adapter_config.json").write_text(json.dumps(config))


async def timed(
    client: AsyncClient, messages: Sequence[dict[str, str]], name: str, gaps: list[float]
) -> AsyncIterator[tuple[str, tuple[int, ...]]]:
    """A stream's pieces; notes the seconds between each two in `gaps`."""
    last_s: float | None = None
    async with client.stream(
        messages=messages, adapter=name, max_tokens=3 * MAX_TOKENS, temperature=0.0, ignore_eos=True
    ) as stream:
        async for delta in stream:
            now_s = time.perf_counter()
            if last_s is not None:
                gaps.append(now_s - last_s)
            last_s = now_s
            yield delta.text, delta.token_ids


def compare_with_peft(model: Path, session: Session, stage: StartStage) -> dict[str, Comparison]:
    """PEFT's greedy tokens for the same prompt, one adapter at a time."""
    with stage("Loading PEFT"):
        from peft_oracle import compare, greedy, load_base
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # it would stand in the middle of ours
        base = load_base(model)
    verdicts = {}
    with stage("Asking PEFT") as tell:
        for done, (name, answer) in enumerate(session.together.items()):
            tell(done=done, total=len(session.together))
            folder = ADAPTERS_DIR / name if name else None
            verdicts[name] = compare(
                answer.token_ids, greedy(base, folder, session.prompt_token_ids, len(answer.token_ids))
            )
    return verdicts


def print_session(session: Session, verdicts: dict[str, Comparison]) -> None:
    """The table, and the three findings."""
    console.print(f"\nOne prompt, one batch, nine answers: [bold]{QUESTION}")
    table = Table(show_lines=True)
    for column in ("adapter", "kind", "r", "k", "answer", "TTFT", "tok/s", "tokens"):
        table.add_column(column, justify="right" if column in ("r", "k", "TTFT", "tok/s") else "left")
    for name, answer in session.together.items():
        table.add_row(*describe(session.adapters.get(name)), *measure(answer), verdict_text(verdicts[name]))
    console.print(table)
    num_tokens = sum(len(answer.token_ids) for answer in session.together.values())
    together, alone = num_tokens / session.together_s, num_tokens / session.one_by_one_s
    console.print(
        f"Together: {num_tokens} tokens in {session.together_s:.1f} s = [bold]{together:.0f} tokens/s[/]. The same "
        f"requests one adapter at a time: {session.one_by_one_s:.1f} s = {alone:.0f} tokens/s. "
        f"Batching across adapters: [bold]{together / alone:.1f}x[/]."
    )
    visit = session.visit
    console.print(
        f"While three requests streamed, an adapter was loaded in {1e3 * visit.load_s:.0f} ms, answered "
        f"{visit.answer.strip()[:40]!r} and was unloaded ({visit.pool_bytes_freed >> 10} KiB freed). Longest pause "
        f"between two messages of a stream: {1e3 * visit.largest_gap_s:.0f} ms. The streams' tokens "
        + ("did not change." if visit.unchanged else "[bold red]CHANGED[/].")
    )


def describe(adapter: Adapter | None) -> tuple[str, ...]:
    """Name, kind, r and k for the table."""
    if adapter is None:
        return "(base model)", "-", "-", "-"
    rank = f"{adapter.rank}+{adapter.hybrid_rank}" if adapter.hybrid_rank else str(adapter.rank)
    return adapter.name, adapter.kind, rank, str(adapter.k)


def measure(answer: Generation) -> tuple[str, ...]:
    """Answer, TTFT and decoding speed for the table."""
    assert answer.ttft_s is not None
    speed = (len(answer.token_ids) - 1) / (answer.total_s - answer.ttft_s) if len(answer.token_ids) > 1 else 0.0
    text = re.sub(r"\s+", " ", answer.text).strip()
    return text, f"{1e3 * answer.ttft_s:.0f} ms", f"{speed:.1f}"


def verdict_text(verdict: Comparison) -> str:
    """How the tokens compare with PEFT's."""
    if not verdict.equal:
        return f"[bold red]differ from PEFT's at {verdict.first_difference}"
    if verdict.flip_at is not None:
        return f"[yellow]= PEFT's up to a tie at {verdict.flip_at}"
    return "[green]= PEFT's"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # transformers' words to peft would stand in the middle of the answers.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    sys.exit(main())
