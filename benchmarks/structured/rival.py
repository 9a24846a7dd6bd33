"""The same in xgrammar, which others use, in processes of their own: one that does not come back can be ended."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.structured.figures import Tried, ms, summary
from benchmarks.structured.rates import Answers
from benchmarks.structured.schemas import schema
from gralora_runtime.structured.compiler import COMPILE_S

START_S = 120.0  # for a process that imports torch


def measure(
    model: Path, vocab_size: int, answers: Answers, fresh: list[str], schemas: Mapping[str, str]
) -> dict[str, Any] | None:
    """None: it is not installed. `fresh`: schemas of ours that nobody compiled before."""
    if find_spec("xgrammar") is None:
        return None
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    process = spawning.Process(target=_of_ours, args=(there, model, vocab_size, answers, fresh))
    process.start()
    there.close()  # so that its end is seen here
    alone = here.recv()
    process.join()
    return {**alone, "public": summary(_try_public(model, vocab_size, schemas))}


def _of_ours(out: Connection, model: Path, vocab_size: int, answers: Answers, fresh: list[str]) -> None:
    import xgrammar

    compiler = _compiler(model, vocab_size)
    compiled_s = []
    for text in fresh:
        began_s = time.perf_counter()
        compiler.compile_json_schema(text)
        compiled_s.append(time.perf_counter() - began_s)
    matchers = [xgrammar.GrammarMatcher(compiler.compile_json_schema(schema(number))) for number in range(len(answers))]
    together = xgrammar.BatchGrammarMatcher()
    words = xgrammar.allocate_token_bitmask(len(matchers), vocab_size)
    masks_s, refused = [], 0
    for tokens in zip(*answers, strict=True):
        began_s = time.perf_counter()
        together.batch_fill_next_token_bitmask(matchers, words)
        masks_s.append(time.perf_counter() - began_s)
        refused += sum(not matcher.accept_token(token) for matcher, token in zip(matchers, tokens, strict=True))
    out.send(
        {
            "version": version("xgrammar"),
            "compile_ms": ms(compiled_s),
            "masks_ms_per_step": ms(masks_s),
            "tokens_that_it_did_not_accept": refused,
        }
    )


def _try_public(model: Path, vocab_size: int, schemas: Mapping[str, str]) -> Iterator[Tried]:
    spawning = multiprocessing.get_context("spawn")
    process: Any = None
    for name, text in schemas.items():
        if process is None:
            here, there = spawning.Pipe()
            process = spawning.Process(target=_compile_all, args=(there, model, vocab_size), daemon=True)
            process.start()
            there.close()  # so that its end is seen here
            assert here.poll(START_S)
            here.recv()
        here.send(text)
        began_s = time.perf_counter()
        try:
            outcome = here.recv() if here.poll(COMPILE_S) else "too slow"
        except EOFError:
            outcome = "ended its process"
        yield Tried(name, outcome, time.perf_counter() - began_s)
        if outcome in ("too slow", "ended its process"):
            process.kill()
            process = None
    if process is not None:
        process.kill()


def _compile_all(ends: Connection, model: Path, vocab_size: int) -> None:
    compiler = _compiler(model, vocab_size)
    ends.send("ready")
    while True:
        text = ends.recv()
        try:
            compiler.compile_json_schema(text)
        except Exception:  # whatever it raises is its answer
            ends.send("refused")
        else:
            ends.send("compiled")


def _compiler(model: Path, vocab_size: int) -> Any:
    import xgrammar
    from transformers import AutoTokenizer

    info = xgrammar.TokenizerInfo.from_huggingface(AutoTokenizer.from_pretrained(model), vocab_size=vocab_size)
    return xgrammar.GrammarCompiler(info, max_threads=1)  # as ours, which has one thread for each schema
