"""A server of our own in a child process, for as long as a block lasts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import psutil

from gralora_runtime.errors import ConfigError

MAIN = "from gralora_server.cli import main; main()"
STOP_S = 30.0
LAST_LINES = 5


@dataclass(frozen=True, slots=True)
class LocalServer:
    """Where it listens."""

    address: str
    metrics_address: str | None
    http_address: str | None
    process: psutil.Process

    @property
    def memory_bytes(self) -> int | None:
        """Resident; None if it died, which its clients have noticed."""
        try:
            return int(self.process.memory_info().rss)
        except psutil.Error:
            return None


@contextmanager
def running(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[LocalServer]:
    """`gralora ARGUMENTS`, which must be a command that prints its address as JSON when it serves.

    Raises ConfigError with the last of what it said if it ends before it serves.
    """
    command = [sys.executable, "-c", MAIN, *arguments, "--json"]
    with subprocess.Popen(  # noqa: S603 -- ourselves
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        errors = _Tail(process.stderr)
        try:
            line = process.stdout.readline()
            if not line:
                process.wait(STOP_S)
                raise ConfigError(f"the server did not start: {errors.text() or f'exit status {process.returncode}'}")
            ready = json.loads(line)
            also = (ready.get("metrics_address"), ready.get("http_address"))
            yield LocalServer(ready["address"], *also, psutil.Process(process.pid))
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()


class _Tail:
    """Reads on, so that the child never waits for a full pipe, and keeps the last lines."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: list[str] = []
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def text(self) -> str:
        self._thread.join(STOP_S)
        return " / ".join(self._lines)

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines = [*self._lines, line.strip()][-LAST_LINES:]
