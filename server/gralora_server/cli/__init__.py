"""The command line. Everything heavy is imported by the command that needs it, so that `--help` stays fast."""

from __future__ import annotations

import sys


def main() -> None:
    """The `gralora` command."""
    from gralora_server.cli.app import run

    sys.exit(run())
