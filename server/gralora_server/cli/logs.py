"""Where log records go: standard error, coloured for a person and plain for a file."""

from __future__ import annotations

import logging

from rich.logging import RichHandler

from gralora_server.cli.output import stderr

LEVELS = ("debug", "info", "warning", "error")


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
