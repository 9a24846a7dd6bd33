"""The project's own tests of exactness and of the engine, on this device: PEFT says what is right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu_check import Check

ROOT = Path(__file__).resolve().parent.parent.parent
SUITES = {
    "logits are PEFT's": ["tests/model/test_exactness.py"],
    "requests do not disturb each other": ["tests/engine/test_async_engine.py"],
    "what only a GPU can do": ["-m", "gpu", "tests/adapters/test_transfer.py", "tests/engine/test_sampler.py"],
}
NEEDS = ("pytest", "peft")
WORKERS = 4  # of each suite, where pytest-xdist is installed


def checks() -> Iterator[Check]:
    """Where tests can run, and there is a GPU: elsewhere `make test` runs them. All suites side by side."""
    if torch.cuda.is_available() and all(map(find_spec, NEEDS)):
        started = {name: _start(suite) for name, suite in SUITES.items()}
        for name, process in started.items():
            yield f"tests: {name}", partial(_passed, process)


def _start(suite: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--durations=3", *suite]
    if find_spec("xdist"):
        command += ["-n", str(WORKERS)]
    environment = os.environ | {"GRALORA_TEST_DEVICE": "cuda"}
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _passed(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate()
    print(output)
    summary = output.strip().splitlines()[-1]
    assert process.returncode == 0, summary
    return summary.strip("= ")
