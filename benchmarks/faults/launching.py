"""Servers that are started in an unusual way, killed, or do not start: where they listen, and what they said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.faults.stage import PATIENCE_S
from gralora_server.loadtest.local_server import MAIN, STOP_S, LocalServer

TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a server ended that did not serve. `code` None: it served, or had done neither in `PATIENCE_S`."""

    code: int | None
    said: str

    def problems(self, what: str, *words: str) -> list[str]:
        """`words`: what has to be named."""
        if self.code is None:
            return [f"{what}: it was not refused"]
        found = [f"{what}: exit status {self.code}"] if self.code <= 0 else []
        if TRACEBACK in self.said:
            found.append(f"{what}: a traceback")
        missing = [word for word in words if word not in self.said]
        return found + [f"{what}: it did not say {word!r} but {self.said[-300:]!r}" for word in missing]


def command_of(arguments: Sequence[str], *, before: Sequence[str] = (), main: str = MAIN) -> list[str]:
    """`before`: a program that becomes the server in the end, with its own arguments. `main`: Python."""
    return [*before, sys.executable, "-c", main, *arguments, "--json"]


@contextmanager
def launched(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Iterator[LocalServer]:
    """Until the block ends, then as SIGTERM ends it. `log`: where its standard error goes."""
    with (
        log.open("ab") as errors,
        subprocess.Popen(  # noqa: S603 -- ourselves
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, f"the server did not start: {log.read_text()[-1000:]}"
            ready = json.loads(line)
            yield LocalServer(ready["address"], ready.get("metrics_address"), psutil.Process(process.pid))
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def refusals(commands: Mapping[str, Sequence[str]]) -> dict[str, Refusal]:
    """What each of them says, all started at once."""
    started = {
        what: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: S603
        for what, command in commands.items()
    }
    return {what: _refusal(process) for what, process in started.items()}


def _refusal(process: subprocess.Popen[str]) -> Refusal:
    """One line, or the end of the output: a server that serves says so at once."""
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        served = process.stdout.readline()
        if served:
            process.kill()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            served = "hung"
            process.kill()
        return Refusal(None if served else process.returncode, process.stderr.read())
