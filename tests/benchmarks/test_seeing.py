"""The benchmark of explaining, logging and tracing, as little of it as there can be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.peft_adapters import gralora_config
from support.workspaces import save_workspace

ROOT = Path(__file__).parent.parent.parent

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")


def test_a_quick_run_has_ratios_spans_and_parts_that_add_up(tmp_path: Path) -> None:
    workspace = save_workspace(tmp_path, {name: gralora_config("llama", 8, 2) for name in ("a", "b", "c")})
    out = tmp_path / "seeing.json"
    command = [sys.executable, "-m", "benchmarks.seeing", "--quick", "--model", str(workspace / "model")]
    command += ["--adapters", str(workspace / "adapters"), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300, capture_output=True)

    found = json.loads(out.read_text())
    assert found["cost"]["throughput_on_over_off"]["median"] > 0
    assert found["cost"]["spans"] > 0
    assert found["cost"]["page"]["looks"] >= 2  # as it was warmed up, and as it was measured
    assert found["explained"]["requests"] == 8
    assert found["explained"]["parts_off_by"]["median"] < 1
    assert {gate["passed"] for gate in found["gates"]} <= {True, False}
