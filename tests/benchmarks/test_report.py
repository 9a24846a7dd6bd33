"""The report, from a stored result alone."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report

HERE = Path(__file__).parent


@pytest.fixture
def result():
    return json.loads((HERE / "result.json").read_text())


def test_the_same_result_gives_the_same_bytes(result, tmp_path):
    notes = tmp_path / "NOTES.md"
    notes.write_text("## What was tried\n\nMuch.\n")
    written = []
    for name in ("first", "second"):
        target = tmp_path / name
        target.mkdir()
        report.write(copy.deepcopy(result), target, notes=notes)
        written.append({path.name: path.read_bytes() for path in target.rglob("*.*")})

    assert written[0] == written[1]
    assert {"REPORT.md", "crowd.svg", "adapters.svg", "kernel.svg"} == written[0].keys()
    assert written[0]["REPORT.md"].decode().endswith("## What was tried\n\nMuch.\n")


def test_the_newest_result_of_a_gpu_stands_in_it_with_its_card(result, tmp_path):
    text = report.write(result, tmp_path, notes=tmp_path / "none", gpu_results=report.HERE / "results" / "gpu")

    newest = max((report.HERE / "results" / "gpu").glob("*.json"))
    checked = json.loads(newest.read_text())
    assert f"On a GPU: {checked['machine']['gpu']}" in text
    assert f"results/gpu/{newest.name}" in text
    for case in (*checked["cases"], *checked["prefill"]):
        assert str(case["times_floor"]) in text


def test_a_quick_run_says_so(result):
    assert "A quick run" not in report.render(result, "", {})
    assert "A quick run" in report.render(result | {"quick": True}, "", {})


def test_it_states_machine_rates_gate_floors_and_what_was_skipped(result):
    text = report.render(result, "", {})

    for needed in (
        "a made-up CPU",
        "commit",
        "torch",
        "read bandwidth",
        "GFLOP/s",
        "Gate: green",
        "times floor",
        "vLLM",
    ):
        assert needed in text


def test_a_pass_is_bound_by_reading_or_by_computing():
    rates = {"read_bytes_per_s": {"x": 1.0, "y": 10.0}, "gemm_flop_per_s": {"z": 100.0}}
    costs = [{"bytes": 20, "flops": 100, "times": 3}, {"bytes": 20, "flops": 1000, "times": 1}]

    measured = report.Measured({"samples_s": [4.0, 1.0, 9.0], "costs": costs, "tokens": 8}, rates)

    assert measured.floor_s == 3 * 2.0 + 10.0
    assert measured.median_s == 4.0
    assert measured.speeds == [2.0, 8.0, 8 / 9]


def test_ratios_are_taken_round_by_round():
    """The machine was half as fast in the second round: a ratio of medians would see it, the paired one does not."""
    assert report.paired([4.0, 2.0, 4.0], [2.0, 1.0, 2.0]) == [2.0, 2.0, 2.0]


def test_it_runs_as_a_script_without_the_package(tmp_path):
    """Anyone who has the JSON can make the report again."""
    shutil.copy(report.__file__, tmp_path / "report.py")
    (tmp_path / "results").mkdir()
    shutil.copy(HERE / "result.json", tmp_path / "results" / "bench.json")

    subprocess.run([sys.executable, "-P", tmp_path / "report.py"], cwd=tmp_path, check=True, timeout=60)

    assert (tmp_path / "REPORT.md").read_text().startswith("# Benchmark report")
