"""A program of ours beside the test that forks a child for each line it is told, and goes with all that it forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import TracebackType
from typing import ClassVar, Self


class Forking:
    """Such a program, seen from a test. Subclasses say which."""

    program: ClassVar[str]  # the path of a script

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, self.program],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # with the child of a test that failed before it killed it
        self._process.communicate()
