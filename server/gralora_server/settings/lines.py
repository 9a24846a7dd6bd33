"""On which line of a TOML text each key stands. `tomllib` has read the text before: what would be wrong in it is not
noticed here, and what it means neither.
"""

from __future__ import annotations

import bisect
import re
import tomllib
from collections.abc import Mapping

Keys = tuple[str | int, ...]  # a number is a place in an array
MAX_DEPTH = 32  # of keys in keys that are told from one another: settings have five, and a line may have thousands

_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r"""
    \"{3} (?: \\. | [^\\] )*? \"{3,5} (?!\")
    | '{3} .*? '{3,5} (?!')
    | \" (?: \\. | [^"\\] )* \"
    | ' [^']* '
    """,
    re.DOTALL | re.VERBOSE,
)
_SCALAR = re.compile(r"[^,\]}#\n]*")


def lines_of(text: str) -> Mapping[Keys, int]:
    """Lines count from 1. A table that is only part of a longer key's path stands where it is first mentioned."""
    scanner = _Scanner(text.replace("\r\n", "\n"))
    scanner.scan()
    return scanner.lines


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._lengths: dict[Keys, int] = {}  # of arrays of tables, so far
        self.lines: dict[Keys, int] = {}

    def scan(self) -> None:
        table: Keys = ()
        while self._skip(_BLANK):
            if self._next() == "[":
                table = self._header()
            else:
                self._pair(table)

    def _header(self) -> Keys:
        """[a.b] or [[a.b]], as the keys of the table that it begins."""
        line, is_array = self._line(), self._text.startswith("[[", self._at)
        self._at += 2 if is_array else 1
        *above, last = self._keys()
        self._at += 2 if is_array else 1
        path: Keys = ()
        for key in above:
            path = self._newest((*path, key))
        path = (*path, last)
        if is_array:
            self._lengths[path] = self._lengths.get(path, 0) + 1
            path = self._newest(path)
        self._note(path, line)
        return path

    def _newest(self, path: Keys) -> Keys:
        """Below an array of tables, a header means its last one."""
        return (*path, self._lengths[path] - 1) if path in self._lengths else path

    def _pair(self, table: Keys) -> None:
        line = self._line()
        path = (*table, *self._keys())
        self._note(path, line)
        self._at += 1  # the sign =
        self._value(path)

    def _keys(self) -> list[str]:
        keys: list[str] = []
        while True:
            self._skip(_SPACE)
            if self._next() in "\"'":
                raw = self._take(_STRING)
                keys.append(tomllib.loads(f"key = {raw}")["key"])
            else:
                keys.append(self._take(_BARE_KEY))
            self._skip(_SPACE)
            if self._next() != ".":
                return keys
            self._at += 1

    def _value(self, path: Keys) -> None:
        self._skip(_SPACE)
        first = self._next()
        if first in "\"'":
            self._take(_STRING)
        elif first == "[":
            self._array(path)
        elif first == "{":
            self._inline_table(path)
        else:
            self._take(_SCALAR)

    def _array(self, path: Keys) -> None:
        self._at += 1
        index = 0
        while self._until("]"):
            self._note((*path, index), self._line())
            self._value((*path, index))
            index += 1

    def _inline_table(self, path: Keys) -> None:
        self._at += 1
        while self._until("}"):
            self._pair(path)

    def _until(self, end: str) -> bool:
        """Whether another element follows, at which we then stand; otherwise we stand behind the end."""
        self._skip(_BLANK)
        if self._next() == ",":
            self._at += 1
            self._skip(_BLANK)
        if self._next() != end:
            return True
        self._at += 1
        return False

    def _note(self, path: Keys, line: int) -> None:
        for length in range(1, min(len(path), MAX_DEPTH) + 1):
            self.lines.setdefault(path[:length], line)

    def _line(self) -> int:
        return bisect.bisect_left(self._newlines, self._at) + 1

    def _next(self) -> str:
        return self._text[self._at]

    def _skip(self, pattern: re.Pattern[str]) -> bool:
        """Whether there is anything behind it."""
        self._take(pattern)
        return self._at < len(self._text)

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        assert match is not None, f"tomllib reads what stands at {self._at}, we do not"
        self._at = match.end()
        return match[0]
