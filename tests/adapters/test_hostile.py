"""Directories that were made to do harm are refused, each for little time and little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import MODULES, write_gralora
from support.hostile import BOMBS, TRAPS, write_hostile

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the largest memory since a moment"
)

ROOT = Path(__file__).parent.parent.parent
MAX_PROCESSOR_S, MAX_MEMORY_BYTES = 2.0, 64 << 20


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What loading each of them took, in one process after the other."""
    folder = tmp_path_factory.mktemp("hostile")
    write_hostile(write_gralora(folder / "good"), folder / "adapters")
    (folder / "modules.json").write_text(json.dumps([astuple(module) for module in MODULES]))
    command = [sys.executable, "-m", "support.measured_inspection", folder / "adapters", folder / "modules.json"]
    run = subprocess.run(
        command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=300, check=False,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}", "PATH": "/usr/bin"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return {line["name"]: line for line in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize("name", [*BOMBS, *TRAPS])
def test_it_is_refused_in_two_seconds_and_64_megabytes(measured: dict[str, dict[str, Any]], name: str) -> None:
    found = measured[name]

    assert found["refused"].startswith(f"adapter {name!r} cannot be served: ")
    assert len(found["refused"]) < 50_000
    assert found["processor_s"] < MAX_PROCESSOR_S
    assert found["memory_bytes"] < MAX_MEMORY_BYTES
