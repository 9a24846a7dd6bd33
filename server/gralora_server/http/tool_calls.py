"""A model's calls of tools, found in its text as that comes. Each is told when it is whole.

One class for each way in which models write them; which one a model has, its chat template says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class FoundCall:
    """`arguments`: a JSON object."""

    name: str
    arguments: str


class ToolScanner(Protocol):
    """Of one choice's text."""

    def push(self, text: str) -> Iterator[str | FoundCall]:
        """What is certain by now."""

    def end(self) -> Iterator[str | FoundCall]:
        """The rest: what began as a call and is none was text."""


class HermesScanner:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, also a list of them. Qwen's and SmolLM2's, too."""

    OPENS, CLOSES = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        self._held = ""
        self._inside = False

    def push(self, text: str) -> Iterator[str | FoundCall]:
        self._held += text
        while True:
            mark = self.CLOSES if self._inside else self.OPENS
            before, found, after = self._held.partition(mark)
            if not found:
                break
            yield from self._call(before) if self._inside else _unless_empty(before)
            self._held, self._inside = after, not self._inside
        if not self._inside:
            keep = _overlap(self._held, self.OPENS)
            certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            yield from _unless_empty(certain)

    def end(self) -> Iterator[str | FoundCall]:
        rest, self._held = self._held, ""
        if self._inside:
            calls = calls_in(rest, "arguments")  # the end of the sequence may stand for the last mark
            yield from calls or [self.OPENS + rest]
        else:
            yield from _unless_empty(rest)

    def _call(self, text: str) -> Iterator[str | FoundCall]:
        yield from calls_in(text, "arguments") or [self.OPENS + text + self.CLOSES]


class Llama3Scanner:
    """The whole answer is `{"name": ..., "parameters": {...}}`, or several of them with semicolons between."""

    def __init__(self) -> None:
        self._held = ""
        self._is_text = False

    def push(self, text: str) -> Iterator[str | FoundCall]:
        self._held += text
        begun = self._held.lstrip()
        if begun and not begun.startswith("{"):
            self._is_text = True
        if self._is_text:
            text, self._held = self._held, ""
            yield from _unless_empty(text)

    def end(self) -> Iterator[str | FoundCall]:
        rest, self._held = self._held, ""
        yield from calls_in(rest, "parameters") or _unless_empty(rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How models of one family write a call: `opens`, an object, `closes`; and `between` two of them."""

    scanner: Callable[[], ToolScanner]
    opens: str
    closes: str
    between: str
    arguments: str  # what the object calls them


FORMATS = {
    "hermes": ToolFormat(
        scanner=HermesScanner,
        opens=f"{HermesScanner.OPENS}\n",
        closes=f"\n{HermesScanner.CLOSES}",
        between="\n",
        arguments="arguments",
    ),
    "llama3_json": ToolFormat(scanner=Llama3Scanner, opens="", closes="", between="; ", arguments="parameters"),
}


def calls_in(text: str, key: str) -> list[str | FoundCall]:
    """Of a text that is nothing else: objects, or lists of them. Empty if something in it is no call."""
    calls: list[str | FoundCall] = []
    for one in _values(text):
        name, arguments = (one.get("name"), one.get(key, {})) if isinstance(one, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return []
        calls.append(FoundCall(name, json.dumps(arguments, ensure_ascii=False)))
    return calls


def _values(text: str) -> list[object]:
    decoder, found, at = json.JSONDecoder(), list[object](), 0
    try:
        while at < len(text):
            if text[at] in " \t\r\n;":
                at += 1
                continue
            value, at = decoder.raw_decode(text, at)
            found += value if isinstance(value, list) else [value]
    except (ValueError, RecursionError):
        return [None]
    return found


def _overlap(text: str, mark: str) -> int:
    """How many characters at the text's end may be the mark's first."""
    return next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)


def _unless_empty(text: str) -> list[str | FoundCall]:
    return [text] if text else []
