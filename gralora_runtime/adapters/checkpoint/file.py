"""Opens and parses files that a stranger wrote, within limits that are checked first. Knows no adapter.

A checkpoint is read in threads beside the one that decodes. Whatever it holds, it may take neither their time (a pipe
that nobody writes to, a number of a million digits, a call that keeps the interpreter lock) nor their memory.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gralora_runtime.adapters.checkpoint.containment import resolve_inside
from gralora_runtime.errors import DescriptorShortageError

NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
MAX_DIGITS = 64  # of a number; integers of 64 bits have 20, floats that are written in full up to 24
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)  # with other errors it is taken for missing


class MalformedError(ValueError):
    """A file that cannot be read, whoever's it is. The message is a sentence for its owner."""


class MissingFileError(MalformedError):
    """There is no such file in a directory that is there."""


def open_regular(directory: Path, file: str, roots: Sequence[Path]) -> BinaryIO:
    """The file, opened to be read. One that leaves `roots` through a link is refused, and so is all that is no file.

    Raises DescriptorShortageError where nobody could tell what it is.
    """
    path = resolve_inside(roots, directory / file)
    if path is None:
        raise MalformedError(f"{file} leaves the adapters directory through a link (--allow-root permits more)")
    try:
        # Opening a pipe would wait for a writer without O_NONBLOCK; a link that was put there a moment ago is no file.
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (OSError, ValueError) as cause:
        if isinstance(cause, OSError) and cause.errno in NO_DESCRIPTOR:
            raise DescriptorShortageError(file) from cause
        if isinstance(cause, OSError) and cause.errno in _UNREADABLE:
            raise MalformedError(f"{file} cannot be read ({cause.strerror})") from cause
        if not directory.is_dir():
            raise MalformedError(f"there is no directory {directory.name}") from cause
        raise MissingFileError(f"{file} is missing") from cause
    if stat.S_ISREG(os.fstat(opened).st_mode):
        return os.fdopen(opened, "rb")
    os.close(opened)
    raise MissingFileError(f"{file} is missing")


def read_at_most(opened: BinaryIO, file: str, num_bytes: int) -> bytes:
    """What is left of the file, or the next so many bytes of it."""
    try:
        return opened.read(num_bytes)
    except OSError as cause:
        raise MalformedError(f"{file} cannot be read ({cause.strerror})") from cause


def read_text(directory: Path, file: str, roots: Sequence[Path], *, max_bytes: int) -> bytes:
    """The whole file. One with more than `max_bytes` is refused, not read."""
    with open_regular(directory, file, roots) as opened:
        text = read_at_most(opened, file, max_bytes + 1)
    if len(text) > max_bytes:
        raise MalformedError(f"{file} has more than {max_bytes} bytes")
    return text


def parse_object(
    file: str, text: bytes, *, max_values: int, make: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> dict[str, Any]:
    """A JSON object of at most about `max_values` values, numbers of at most `MAX_DIGITS` characters and no key twice.

    Commas, brackets and quotation marks are counted first, because values take up to a hundred times their text.

    `make` turns the pairs of each object into something else than a dictionary.
    """
    if max(text.count(b",") + text.count(b"[") + text.count(b"{"), text.count(b'"')) > max_values:
        raise MalformedError(f"{file} has more than {max_values} entries")
    try:
        parsed = json.loads(
            text.decode("utf-8"), parse_int=_integer, parse_float=_number, object_pairs_hook=make or unique_keys
        )
    except (ValueError, RecursionError) as cause:
        raise MalformedError(f"{file} is not JSON ({cause})") from cause
    if not isinstance(parsed, dict):
        raise MalformedError(f"{file} is not a JSON object but {type(parsed).__name__}")
    return parsed


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two equal keys they believe, so neither is believed."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _integer(digits: str) -> int:
    return int(_short(digits))


def _number(digits: str) -> float:
    return float(_short(digits))


def _short(digits: str) -> str:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} characters")
    return digits
