"""Where log records go: standard error, for people (coloured on a terminal) or as one JSON object a line."""

from __future__ import annotations

import json
import logging
import math
import time
from datetime import UTC, datetime

from rich.logging import RichHandler

from gralora_server.call_line import CallLine
from gralora_server.cli.output import stderr

QUIET_S = 10.0
# grpc logs a traceback for every header or path that is not UTF-8, which anybody may send as often as he likes.
NOISY = "grpc._cython.cygrpc"
MOST = 20  # of the same warning in `QUIET_S`
MAX_KINDS = 1000  # of warnings that are told apart


class Sparse(logging.Filter):
    """Lets a record through every `QUIET_S` at most."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet_until_s = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002
        now_s = time.monotonic()
        if now_s < self._quiet_until_s:
            return False
        self._quiet_until_s = now_s + QUIET_S
        return True


class Repeats(logging.Filter):
    """Of warnings and errors that one line of code causes again and again, lets `MOST` through in `QUIET_S`; the next
    one says how many there were besides."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, int], tuple[float, int]] = {}  # since when, and how many

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        kind, now_s = (record.pathname, record.lineno), time.monotonic()
        since_s, count = self._seen.get(kind, (now_s, 0))
        if now_s - since_s >= QUIET_S:
            if count > MOST:
                record.msg = f"{record.msg} ({count - MOST} more were not logged)"
            since_s, count = now_s, 0
        if len(self._seen) >= MAX_KINDS:
            self._seen.clear()
        self._seen[kind] = (since_s, count + 1)
        return count < MOST


class AsJson(logging.Formatter):
    """One object a line. A call's fields are its own; of all others there is a message."""

    def format(self, record: logging.LogRecord) -> str:
        said = record.args[0] if isinstance(record.args, tuple) and record.args else None
        fields = said.fields if isinstance(said, CallLine) else {"message": record.getMessage()}
        traceback = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": when, "level": record.levelname, "logger": record.name, **fields, **traceback})


def configure(level: str, log_format: str = "human") -> None:
    handler = _handler(log_format)
    handler.addFilter(Repeats())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger(NOISY).addFilter(Sparse())


def _handler(log_format: str) -> logging.Handler:
    console = stderr()
    handler: logging.Handler
    if log_format == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(AsJson())
    elif console.is_terminal:
        handler = RichHandler(console=console, show_path=False, markup=False, rich_tracebacks=False)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler
