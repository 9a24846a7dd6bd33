"""Tokens that an adapter's `tokenizer.json` has behind those of the base model's tokenizer. Knows no tokenizer.

Of a stranger's tokenizer nothing else is read: the base model's splits text, in ways that are known to end, and these
tokens, which are plain strings, are put behind its own, as `tokenizer.add_tokens` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gralora_runtime.adapters.checkpoint.file import (
    MalformedError,
    MissingFileError,
    open_regular,
    parse_object,
    read_at_most,
)

TOKENIZER_FILE = "tokenizer.json"
MAX_BYTES = 1 << 20  # in which they have to be: the vocabulary that follows is ten times as much, and not read
MAX_CHARS = 1024  # of one
_MAX_VALUES = 1 << 16
_KEY = re.compile(rb'"added_tokens"\s*:\s*(?=\[)')
_END = re.compile(rb'\]\s*,\s*"normalizer"\s*:')
_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnToken:
    """One token, as `tokenizers.AddedToken` has it."""

    content: str
    special: bool
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool


def read_own_tokens(directory: Path, roots: Sequence[Path], *, known: int, vocab_size: int) -> tuple[OwnToken, ...]:
    """Those with the ids from `known` on, which is how many the base model's tokenizer has, in their order.

    None if there is no such file. Raises MalformedError, also where an id is missing or not below `vocab_size`.
    """
    try:
        text = added_tokens_text(directory, roots)
    except MissingFileError:
        return ()
    found = parse_object(TOKENIZER_FILE, text, max_values=_MAX_VALUES)["added_tokens"]
    own = dict(_own(found, known))
    ids = sorted(own)
    if ids != list(range(known, known + len(ids))):
        raise MalformedError(f"{TOKENIZER_FILE}: its ids {ids[:4]}... do not follow the base model's {known} tokens")
    if ids and ids[-1] >= vocab_size:
        raise MalformedError(f"{TOKENIZER_FILE}: there is no row for its token {ids[-1]} (0 to {vocab_size - 1} have)")
    return tuple(own[at] for at in ids)


def added_tokens_text(directory: Path, roots: Sequence[Path]) -> bytes:
    """The part of the file that is read, as a file of its own. Raises MissingFileError, or MalformedError."""
    with open_regular(directory, TOKENIZER_FILE, roots) as opened:
        text = read_at_most(opened, TOKENIZER_FILE, MAX_BYTES)
    begin = _KEY.search(text)
    end = begin and _END.search(text, begin.end())
    if begin is None or end is None:
        raise MalformedError(f"{TOKENIZER_FILE}: its first {MAX_BYTES} bytes have no added_tokens before a normalizer")
    return b'{"added_tokens": ' + text[begin.end() : end.start()] + b'], "normalizer": null}'


def describe(tokens: Sequence[OwnToken]) -> bytes:
    """What an adapter's digest covers of them; nothing, if it has none."""
    return json.dumps([asdict(token) for token in tokens]).encode() if tokens else b""


def _own(found: Any, known: int) -> Iterator[tuple[int, OwnToken]]:
    for at, one in enumerate(found if isinstance(found, list) else ()):
        if not isinstance(one, dict) or type(one.get("id")) is not int:
            raise MalformedError(f"{TOKENIZER_FILE}: added_tokens[{at}] is no token with an id")
        if one["id"] < known:
            continue
        content: Any = one.get("content")
        flags: dict[str, Any] = {flag: one.get(flag) for flag in _FLAGS}
        if not isinstance(content, str) or not 0 < len(content) <= MAX_CHARS:
            raise MalformedError(f"{TOKENIZER_FILE}: added_tokens[{at}] is no text of 1 to {MAX_CHARS} characters")
        if not all(isinstance(value, bool) for value in flags.values()):
            raise MalformedError(f"{TOKENIZER_FILE}: added_tokens[{at}] has flags that are neither true nor false")
        yield one["id"], OwnToken(content=content, **flags)
