"""A server that must not start, and what it says instead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from gralora_server.loadtest.local_server import MAIN

PATIENCE_S = 60.0


def problems_of_start(arguments: Sequence[str], *, names: str) -> list[str]:
    """None, if the server ends with an exit code and one line that tells what is wrong with whom it `names`."""
    command = [sys.executable, "-c", MAIN, *arguments]
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [f"the server started in spite of {names}, or hung"]
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    problems = []
    if ended.returncode not in (1, 2):
        problems.append(f"the exit code was {ended.returncode}")
    if len(lines) != 1 or not lines[0].startswith("error: "):
        problems.append(f"the refusal was no one line: {lines}")
    if names not in ended.stderr:
        problems.append(f"the refusal does not name {names}: {lines}")
    return problems
