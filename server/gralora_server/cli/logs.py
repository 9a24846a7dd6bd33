"""Where log records go: standard error, coloured for a person and plain for a file."""

from __future__ import annotations

import logging
import math
import time

from rich.logging import RichHandler

from gralora_server.cli.output import stderr

QUIET_S = 10.0
# grpc logs a traceback for every header or path that is not UTF-8, which anybody may send as often as he likes.
NOISY = "grpc._cython.cygrpc"


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


def configure(level: str) -> None:
    console = stderr()
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, markup=False, rich_tracebacks=False)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger(NOISY).addFilter(Sparse())
