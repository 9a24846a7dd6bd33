"""`golden.json` beside an adapter's files: prompts, and the tokens that it is known to answer greedily. No model here.

    {"version": 1, "model": NAME, "cases": [{"prompt_token_ids": [...], "expected_token_ids": [...]}, ...]}

What is expected ends with the model's end-of-sequence token where that came first. Whoever compares asks for as many
tokens as are expected.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gralora_runtime.adapters.checkpoint.file import MalformedError, parse_object, read_text
from gralora_runtime.adapters.checkpoint.header import GOLDEN_FILE
from gralora_runtime.adapters.checkpoint.spec import clipped, rejected
from gralora_runtime.adapters.checkpoint.writer import replace_file

VERSION = 1
MAX_BYTES = 64 << 10
MAX_CASES = 16
MAX_TOKENS = {"prompt_token_ids": 512, "expected_token_ids": 64}
MAX_MODEL_CHARS = 256
# Commas and brackets of a file with as many ids as it may have are fewer.
_MAX_VALUES = 2 * MAX_CASES * sum(MAX_TOKENS.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenCase:
    """One prompt and its answer."""

    prompt_token_ids: tuple[int, ...]
    expected_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """All of an adapter's. `model` is the base model's name when they were made."""

    model: str
    cases: tuple[GoldenCase, ...]


@dataclass(frozen=True, slots=True)
class GoldenAnswer:
    """What a server answers to one prompt. `rivals`: per token, the likeliest ones and their log probabilities."""

    token_ids: tuple[int, ...]
    rivals: tuple[tuple[tuple[int, float], ...], ...]
    tie: float  # natural log: what is closer than that to the likeliest may be chosen as well, by rounding


def difference(case: GoldenCase, answer: GoldenAnswer) -> str:
    """What is wrong with the answer; "" if nothing is.

    Behind a tie that went the other way the two say nothing of each other, so that is where comparing ends.
    """
    expected, answered = case.expected_token_ids, answer.token_ids
    pairs = zip(expected, answered, strict=False)
    at = next((at for at, (wanted, given) in enumerate(pairs) if wanted != given), min(len(expected), len(answered)))
    if at == len(expected) == len(answered) or _is_tie(case, answer, at):
        return ""
    wanted, given = _shown(list(expected[at : at + 3])), _shown(list(answered[at : at + 3]))
    return f" answers {given} where {wanted} was expected, from its token {at} on"


def _is_tie(case: GoldenCase, answer: GoldenAnswer, at: int) -> bool:
    if at >= min(len(case.expected_token_ids), len(answer.rivals)):
        return False
    logprobs = dict(answer.rivals[at])
    wanted = logprobs.get(case.expected_token_ids[at])
    return wanted is not None and max(logprobs.values()) - wanted <= answer.tie


def has_golden(directory: Path) -> bool:
    """Whether there is such a file, readable or not."""
    return os.path.lexists(directory / GOLDEN_FILE)


def read_golden(directory: Path, *, vocab_size: int, roots: Sequence[Path] = ()) -> Golden | None:
    """None if the adapter has no such file. Raises AdapterRejectedError with every reason why it cannot be used."""
    if not has_golden(directory):
        return None
    try:
        found = parse_object(
            GOLDEN_FILE, read_text(directory, GOLDEN_FILE, roots, max_bytes=MAX_BYTES), max_values=_MAX_VALUES
        )
    except MalformedError as cause:
        raise rejected(directory.name, [str(cause)]) from cause
    return _checked(directory.name, found, vocab_size)


def write_golden(directory: Path, golden: Golden, *, vocab_size: int) -> None:
    """In place of the one that is there. Raises AdapterRejectedError if it could not be read back, or ConfigError."""
    cases = [{key: list(getattr(case, key)) for key in MAX_TOKENS} for case in golden.cases]
    document = {"version": VERSION, "model": golden.model, "cases": cases}
    _checked(directory.name, document, vocab_size)
    text = json.dumps(document, separators=(",", ":")) + "\n"
    if len(text) > MAX_BYTES:
        raise rejected(directory.name, [f"{GOLDEN_FILE} would have {len(text)} bytes (at most {MAX_BYTES})"])
    replace_file(directory / GOLDEN_FILE, text)


def _checked(name: str, document: Mapping[str, Any], vocab_size: int) -> Golden:
    if problems := [f"{GOLDEN_FILE}: {problem}" for problem in _problems(document, vocab_size)]:
        raise rejected(name, problems)
    cases = [GoldenCase(**{key: tuple(case[key]) for key in MAX_TOKENS}) for case in document["cases"]]
    return Golden(model=document["model"], cases=tuple(cases))


def _problems(document: Mapping[str, Any], vocab_size: int) -> Iterator[str]:
    version, model, cases = (document.get(key) for key in ("version", "model", "cases"))
    yield from (f"{_shown(key)} is unknown" for key in sorted(document.keys() - {"version", "model", "cases"}))
    if type(version) is not int or version != VERSION:
        yield f"version: {_shown(version)} is not {VERSION}"
    if not isinstance(model, str) or len(model) > MAX_MODEL_CHARS:
        yield f"model: {_shown(model)} is not a string of at most {MAX_MODEL_CHARS} characters"
    if not isinstance(cases, list) or not 1 <= len(cases) <= MAX_CASES:
        yield f"cases: {_shown(cases)} is not a list of 1 to {MAX_CASES}"
        return
    for index, case in enumerate(cases):
        yield from (f"cases[{index}]{problem}" for problem in _case_problems(case, vocab_size))


def _case_problems(case: Any, vocab_size: int) -> Iterator[str]:
    if not isinstance(case, dict) or case.keys() != MAX_TOKENS.keys():
        yield f": {_shown(case)} is not an object of {' and '.join(MAX_TOKENS)}"
        return
    for key, limit in MAX_TOKENS.items():
        ids = case[key]
        if not isinstance(ids, list) or not 1 <= len(ids) <= limit:
            yield f".{key}: {_shown(ids)} is not a list of 1 to {limit} token ids"
            continue
        wrong = next(
            (at for at, token in enumerate(ids) if type(token) is not int or not 0 <= token < vocab_size), None
        )
        if wrong is not None:
            yield f".{key}[{wrong}]: {_shown(ids[wrong])} is not a token id of this model (0 to {vocab_size - 1})"


def _shown(value: object) -> str:
    return clipped(reprlib.repr(value), 120)
