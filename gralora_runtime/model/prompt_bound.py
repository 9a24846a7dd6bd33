"""How few tokens a text can possibly be, by its bytes alone. Knows a tokenizer's vocabulary, and no limit.

Tokenizing 4 MiB takes seconds and hundreds of megabytes, counting their bytes a few milliseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

NUM_BYTES = 256
NUM_ASCII = 128
NFC_SHRINKS = 3.5  # times at most, in UTF-8: U+1FBE, U+0308 and U+0301 of seven bytes become U+0390 of two
HARMLESS = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"}  # pre-tokenizers, unless they remove something
LAST_SPACE = 0x3000  # of Unicode's
WHITE_SPACE = {byte for code in range(LAST_SPACE + 1) if chr(code).isspace() for byte in chr(code).encode()}


@dataclass(frozen=True, slots=True)
class PromptBound:
    """A byte's share is one part in the length of the longest token that has such a byte. The shares of a token's bytes
    then sum to one at most, and so a text has no fewer tokens than its bytes' shares sum to.
    """

    shares: NDArray[np.float64] | None  # [256]; None: nothing can be said of texts that this tokenizer is given
    replacements: tuple[tuple[str, str], ...] = ()  # what the tokenizer puts in the place of single characters
    composes: bool = False  # it brings texts to Unicode's normal form C, which may be shorter

    def least_tokens(self, text: str) -> int:
        """No text of fewer tokens has these bytes; the tokenizer may add some of its own, which do not count."""
        if self.shares is None:
            return 0
        for character, replacement in self.replacements:
            text = text.replace(character, replacement)
        data = np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8)
        stays = np.ones(len(data), np.bool_)
        if self.composes:  # nothing composes with an ASCII character but what follows it, and is none
            stays = data < NUM_ASCII
            stays[:-1] &= data[1:] < NUM_ASCII
        others = (len(data) - np.count_nonzero(stays)) / NFC_SHRINKS
        sum_of_shares = np.bincount(data[stays], minlength=NUM_BYTES) @ self.shares + others * self.shares.min()
        return math.ceil(float(sum_of_shares) * (1 - 1e-9))  # what rounding may have added


def prompt_bound(tokenizer: Tokenizer) -> PromptBound:
    """Of byte-pair encodings of bytes, or of characters with bytes to fall back on. Of others nothing is said."""
    described = json.loads(tokenizer.to_str())
    splitters = list(_flat(described["pre_tokenizer"], "pretokenizers"))
    normalizers = list(_flat(described["normalizer"], "normalizers"))
    replacements = _replacements(normalizers, splitters)
    composes = any(part["type"] == "NFC" for part in normalizers)
    by_bytes = any(part["type"] == "ByteLevel" for part in splitters)
    if (
        replacements is None
        or (composes and replacements)
        or any(part["type"] not in HARMLESS or part.get("behavior") == "Removed" for part in splitters)
        or not _is_understood(described["model"], by_bytes=by_bytes)
    ):
        return PromptBound(None)
    vocabulary: dict[str, int] = described["model"]["vocab"]
    shares = _shares(_token_bytes(described, replacements, by_bytes=by_bytes))
    if by_bytes:
        # What is in no vocabulary is dropped.
        shares[[byte for character, byte in _characters_of_bytes().items() if character not in vocabulary]] = 0.0
    if any(token["lstrip"] or token["rstrip"] for token in described["added_tokens"]):
        # Such a token takes all white space beside it, however much.
        shares[list(WHITE_SPACE.union(*(new.encode() for _, new in replacements)))] = 0.0
    return PromptBound(shares, replacements, composes)


def _flat(part: dict[str, Any] | None, of_sequence: str) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part[of_sequence]:
            yield from _flat(inner, of_sequence)
    else:
        yield part


def _replacements(
    normalizers: list[dict[str, Any]], splitters: list[dict[str, Any]]
) -> tuple[tuple[str, str], ...] | None:
    """None if a normalizer does more than that, but for what `composes` says and what makes texts longer."""
    found: list[tuple[str, str]] = []
    for part in normalizers:
        if part["type"] == "Replace" and len(part["pattern"].get("String", "")) == 1:
            found.append((part["pattern"]["String"], part["content"]))
        elif part["type"] not in ("NFC", "Prepend"):
            return None
    found += [(" ", part["replacement"]) for part in splitters if part["type"] == "Metaspace"]
    return tuple(found)


def _is_understood(model: dict[str, Any], *, by_bytes: bool) -> bool:
    """Otherwise one unknown token may stand for a text of any length, or none at all."""
    if model["type"] != "BPE" or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return False
    return by_bytes or (
        model["byte_fallback"] and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(NUM_BYTES))
    )


def _token_bytes(
    described: dict[str, Any], replacements: tuple[tuple[str, str], ...], *, by_bytes: bool
) -> Iterator[bytes]:
    byte_of = _characters_of_bytes()
    for token in described["model"]["vocab"]:
        if not by_bytes:
            yield token.encode()
        elif byte_of.keys() >= set(token):  # no other is ever made of a text's bytes
            yield bytes(byte_of[character] for character in token)
    for added in described["added_tokens"]:
        content = added["content"]
        for character, replacement in replacements:
            content = content.replace(character, replacement)
        yield content.encode()


def _shares(tokens: Iterable[bytes]) -> NDArray[np.float64]:
    shares = np.ones(NUM_BYTES)
    unseen = set(range(NUM_BYTES))
    for token in sorted(tokens, key=len, reverse=True):
        for byte in unseen.intersection(token):
            shares[byte] = 1 / len(token)
            unseen.remove(byte)
    return shares


def _characters_of_bytes() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes in, as GPT-2 chose them: printable ones for themselves,
    the others in their order from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    codes = {chr(byte): byte for byte in printable}
    return codes | {chr(NUM_BYTES + index): byte for index, byte in enumerate(others)}
