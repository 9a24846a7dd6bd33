"""A process of its own that answers one line of JSON with one line of JSON."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.measurement import Answer, Run
from benchmarks.workload import Request

ROOT = Path(__file__).parent.parent


class WorkerError(Exception):
    """The process died, or could not do what it was asked; the text ends with the last line of its errors."""


class Worker:
    """`answer` lines start with `{`; whatever else a library prints is passed over."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed with the process
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Send a question and wait for its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as cause:
            raise self._death() from cause
        return self.read()

    def read(self) -> dict[str, Any]:
        """Wait for the next answer."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise self._death()

    def run(self, requests: Sequence[Request]) -> Run:
        """The worker's answers: token ids and when each came."""
        return Run(
            tuple(
                Answer(request, tuple(answer["tokens"]), tuple(answer["times_s"]))
                for request, answer in zip(requests, self.answers(requests), strict=True)
            )
        )

    def answers(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """With all that it tells of each."""
        asked = [
            {"adapter": request.adapter, "prompt": request.prompt, "max_tokens": request.max_tokens}
            for request in requests
        ]
        answers: list[dict[str, Any]] = self.ask({"requests": asked})["answers"]
        return answers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.communicate()
        self._errors.close()

    def _death(self) -> WorkerError:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return WorkerError(f"exit status {self._process.returncode}: {lines[-1] if lines else 'no message'}")
