"""Other people's command lines, ended in the middle of what they print."""

from __future__ import annotations

import subprocess


def leave_after_a_line(command: list[str]) -> str:
    """The first line that it prints; the command is ended then."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            return process.stdout.readline()
        finally:
            process.kill()
