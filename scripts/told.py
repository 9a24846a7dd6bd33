"""Runs a command that takes long, and says meanwhile what it does and for how long already.

    python scripts/told.py 'Installing packages' .venv/bin/python -m pip install torch

Needs the standard library alone: the Makefile installs all others with it. Ends as the command does, whose output is
shown if it fails.
"""

from __future__ import annotations

import collections
import subprocess
import sys
import threading
import time

BEAT_S = 1.0
LAST_LINES = 50  # of a command that failed
WIDTH = 60


def main() -> int:
    """The command's exit code."""
    what, *command = sys.argv[1:]
    lines: collections.deque[str] = collections.deque([""], maxlen=LAST_LINES)
    begun_s = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        reader = threading.Thread(target=lambda: lines.extend(line.rstrip() for line in process.stdout or ()))
        reader.start()
        while True:
            say(f"{what}: {time.monotonic() - begun_s:.0f} s so far, {lines[-1][:WIDTH]}")
            try:
                process.wait(BEAT_S)
                break
            except subprocess.TimeoutExpired:
                continue
        reader.join()
    failed = f", failed with {process.returncode}" if process.returncode else ""
    say(f"{what}: {time.monotonic() - begun_s:.1f} s{failed}", "\n")
    if process.returncode:
        sys.stdout.write("\n".join(lines) + "\n")
    return process.returncode


def say(text: str, end: str = "") -> None:
    """A line, or on a terminal the same one again."""
    is_terminal = sys.stdout.isatty()
    sys.stdout.write(f"\r\x1b[K{text}{end}" if is_terminal else f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
