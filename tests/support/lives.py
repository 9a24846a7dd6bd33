"""A program whose children are real servers that live until they are killed. Reads a command's arguments a line.

Of each child it tells: `pid P`; whatever the server says; and once it is gone, `gone STATUS`. What a server imports is
imported once and children are forked, because a hundred interpreters would take longer than all that is tested.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from support.forking import Forking

from gralora_server.cli import main

HEAVY = (
    "gralora_server.cli.app",
    "gralora_server.service",
    "gralora_runtime.assemble",
    "gralora_kernels.cpu.backend",
    "gralora_kernels.cpu.program",
    "transformers.models.llama.modeling_llama",
)


def serve_until_killed(arguments: Sequence[str]) -> None:
    os.write(1, f"pid {os.getpid()}\n".encode())
    sys.argv = ["gralora", "serve", *arguments]
    main()


def run() -> None:
    for module in HEAVY:
        import_module(module)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            serve_until_killed(json.loads(line))
        _, status = os.waitpid(child, 0)
        os.write(1, f"gone {os.waitstatus_to_exitcode(status)}\n".encode())


class Lives(Forking):
    """That program, seen from a test."""

    program = __file__

    def start(self, *arguments: object) -> int:
        """The pid of a server that begins to start."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        told, pid = self._line().split()
        assert told == "pid"
        return int(pid)

    def address(self) -> str:
        """Of that server, once it is ready."""
        return str(json.loads(self._line())["address"])

    def kill(self, pid: int) -> None:
        """Whatever it is doing."""
        os.kill(pid, signal.SIGKILL)
        while not (line := self._line()).startswith("gone"):
            pass
        assert line == f"gone {-signal.SIGKILL}"

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the program has ended"
        return line.rstrip("\n")


if __name__ == "__main__":
    run()
