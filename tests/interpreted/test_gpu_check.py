"""What `make gpu-check` would do on a GPU, as far as tiny shapes and the interpreter can show it in a test's time.

All of it runs by `make gpu-check CHECK=--dry`.
"""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu_check import __main__ as check
from benchmarks.gpu_check import kernels, part

RATES = {"read_gb_s": 20.0, "product_tflop_s": 0.05}


def test_every_kernel_is_checked_against_its_twin():
    lines = list(part.run("kernels-float32", {}))

    assert [line for line in lines if not line["passed"]] == []
    for kernel in ("adapters", "attention", "norm", "product", "lists"):
        assert any(kernel in line["name"] for line in lines)


def test_a_kernel_that_is_wrong_fails_its_check_and_no_other(monkeypatch):
    monkeypatch.setattr(kernels, "activate", lambda out, x, kind, *, gated: out.fill_(1))

    failed = [line for line in part.run("kernels-float32", {}) if not line["passed"]]

    assert [line["name"] for line in failed] == ["norm, rotary, activation float32"]
    assert "RMS error" in failed[0]["detail"]


def test_attention_stands_beside_its_floor():
    (line,) = part.run("attention", RATES)

    assert line["ms"] > 0
    assert line["floor_ms"] > 0
    assert line["share_of_bandwidth"] == pytest.approx(line["floor_ms"] / line["ms"], abs=1e-3)


def test_a_result_has_every_part_and_a_part_that_fails_is_a_check_that_did_not_pass(monkeypatch, tmp_path, capsys):
    times = {"step_ms": 2.0, "floor_ms": 1.0, "times_floor": 2.0}
    case = {"shape": "tiny", "adapters": "base", "r": None, "k": None, "rows": 1} | times

    def say(name: str, *_: object, **__: object) -> list[dict]:
        found = {"facts": {"what": "facts", "gpu": "A GPU"}, "steps": {"what": "step"} | case}
        passed = {"what": "check", "name": f"part {name}", "passed": name != "loads", "detail": "as the test says"}
        return [passed, *([found[name]] if name in found else [])]

    monkeypatch.setattr(check, "run_part", say)
    monkeypatch.setattr("sys.argv", ["gpu_check", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        check.main()

    (file,) = tmp_path.glob("*-a-gpu.json")
    result = json.loads(file.read_text())
    assert ended.value.code == 1
    assert result["machine"] == {"gpu": "A GPU"}
    assert result["cases"] == [case]
    assert "FAILED part loads: as the test says" in capsys.readouterr().out


def test_a_part_that_dies_or_hangs_does_not_stop_the_others(tmp_path):
    (died,) = check.run_part("no such part", 60, logs=tmp_path, dry=False, machine={})
    *_, late = check.run_part("kernels-float32", 0, logs=tmp_path, dry=False, machine={})

    assert (died["passed"], died["detail"]) == (False, "exit code 1")
    assert (late["passed"], late["detail"]) == (False, "took more than 0 s")
