"""What `python -m benchmarks.gpu_check` makes of its parts. All of them run by `make gpu-check CHECK=--dry`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import part


def test_a_check_that_fails_in_a_part_fails_the_run_by_name(monkeypatch, tmp_path, capsys):
    """Through a part's own process: what a part finds was once lost on its way, and all runs passed."""
    found = {"what": "check", "name": "adapters float32", "passed": False, "detail": "RMS error 0.5"}
    child = f"import sys; open(sys.argv[-1], 'w').write({json.dumps(found)!r} + chr(10))"
    run = subprocess.run

    def only_kernels(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return run([sys.executable, "-c", child, command[-1]], **options)

    monkeypatch.setattr(gpu_check, "STAGES", ({"kernels-float32": 60}, {"steps": 60}))
    monkeypatch.setattr(gpu_check.subprocess, "run", only_kernels)
    monkeypatch.setattr("sys.argv", ["gpu_check", "--only", "kernels-float32", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()

    (file,) = tmp_path.glob("*.json")
    assert ended.value.code == 1
    assert "FAILED adapters float32: RMS error 0.5" in capsys.readouterr().out
    assert json.loads(file.read_text())["checks"] == [
        {"name": "adapters float32", "passed": False, "detail": "RMS error 0.5"},
        {"name": "part kernels-float32", "passed": True, "detail": "ended"},
    ]


def test_a_part_that_there_is_not_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_check", "--only", "steps,speed"])

    with pytest.raises(SystemExit):
        gpu_check.main()

    assert "--only: there is no part speed; there are facts, kernels-float32," in capsys.readouterr().err


def test_a_check_that_raises_is_named_and_the_next_one_is_done():
    def wrong() -> str:
        raise AssertionError("RMS error 0.5\nand more")

    lines = list(part.checked([("wrong", wrong), ("right", lambda: "as it should be")]))

    assert lines == [
        {"what": "check", "name": "wrong", "passed": False, "detail": "AssertionError: RMS error 0.5"},
        {"what": "check", "name": "right", "passed": True, "detail": "as it should be"},
    ]


def test_without_a_gpu_a_run_that_is_not_dry_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    (line,) = gpu_check.run_part("facts", 60, logs=tmp_path, dry=False, machine={})

    assert (line["passed"], line["detail"]) == (False, "exit code 1")
    assert "torch sees no GPU here; with --dry everything runs on the CPU" in capsys.readouterr().out
