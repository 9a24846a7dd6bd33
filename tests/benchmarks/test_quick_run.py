"""The whole benchmark, as little of it as there can be: every contender, the real server, the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.tiny_models import save_tiny_model

ROOT = Path(__file__).parent.parent.parent


def test_a_quick_run_measures_everything_and_is_marked_as_quick(tmp_path):
    model = save_tiny_model("llama", tmp_path / "tiny")
    out = tmp_path / "out" / "quick.json"

    subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--model", str(model), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
        capture_output=True,
    )

    result = json.loads(out.read_text())
    assert result["quick"] is True
    keys = [s["key"] for s in result["sections"]]
    assert keys == ["one", "crowd", "kinds", "adapters", "kind-steps", "adapter-steps", "prefill", "kernel", "grpc"]
    assert all(row["samples_s"] and row["costs"] for section in result["sections"] for row in section["rows"])
    assert result["isolation"]["requests"] == result["isolation"]["same_tokens"]
    assert str(tmp_path) not in out.read_text()
    assert "A quick run" in (out.parent / "quick" / "REPORT.md").read_text()
