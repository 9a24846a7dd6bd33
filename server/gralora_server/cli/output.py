"""What the commands print and how they end. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, is_dataclass
from datetime import datetime
from enum import Enum, IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

PIPE_WIDTH = 200


class ExitCode(IntEnum):
    """As documented in `gralora --help`."""

    OK = 0
    FAILED = 1
    DIFFERENT = 1  # as diff and cmp do
    USAGE = 2
    UNREACHABLE = 3
    UNFIT_ADAPTER = 4


class CommandError(Exception):
    """Ends the command with one line on standard error."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def stdout() -> Console:
    """Made when needed, because `sys.stdout` is replaced by tests. A pipe does not cut tables to a terminal's width."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def stderr() -> Console:
    """One for as long as `sys.stderr` is the same: a line that another wrote would tear the bars of this one."""
    return _console_on(
        getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    )  # while bars are shown, rich's own is there


@lru_cache(maxsize=1)
def _console_on(stream: TextIO) -> Console:
    return Console(file=stream, stderr=True, highlight=False)


def print_json(document: object) -> None:
    """One JSON document, and nothing else on standard output."""
    sys.stdout.write(json.dumps(document, default=_plain, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def announce(address: str, *, as_json: bool, **also: object) -> None:
    """The line that scripts wait for, when requests are taken."""
    if as_json:
        print_json({"address": address, **also})
    else:
        stdout().print(f"SERVING on {address}", markup=False, soft_wrap=True)


def print_line(line: str) -> None:
    """As it is, and at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def print_error(message: str) -> None:
    """One line, whatever the message holds."""
    stderr().print(f"error: {' '.join(message.split())}", style="bold red", markup=False, soft_wrap=True)


def human_bytes(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} has no JSON form")
