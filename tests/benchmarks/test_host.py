"""The bench of the host beside a GPU, on a device that takes a moment. Speed is not looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.host import __main__ as bench
from benchmarks.host import engine

COLUMNS = {"rows", "adapters", "plan_ms", "build_ms", "sample_ms", "commit_ms", "step_over_T", "idle_share"}


@pytest.mark.parametrize("pipelined", [False, True], ids=["serial", "pipelined"])
@pytest.mark.parametrize("adapters", ["distinct", "zipf", "base"])
def test_tokens_are_right_and_each_phase_has_its_time(adapters: str, pipelined: bool) -> None:
    cost = engine.measure(3, adapters, 0.002, pipelined=pipelined, steps=20)

    assert min(cost.plan_ms, cost.build_ms, cost.launch_ms, cost.commit_ms) > 0
    assert cost.step_over_T >= 0.9


def test_a_wrong_token_fails_the_bench() -> None:
    with pytest.raises(AssertionError, match=r"token 2 is 5, not"):
        engine.check([1, 2, 5], num_prompt=2, slot=0)


def test_the_result_has_what_is_compared_later(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "sys.argv",
        ["host", "--no-grpc", "--rows", "2", "--rounds", "1", "--step-ms", "2", "--json", str(tmp_path / "r")],
    )
    bench.main()
    result = json.loads((tmp_path / "r").read_text())

    assert result["T_ms"] == 2
    assert {(row["adapters"], row["pipeline"]) for row in result["rows"]} == {
        ("distinct", "on"), ("distinct", "off"), ("zipf", "on"),
    }  # fmt: skip
    assert all(row.keys() >= COLUMNS for row in result["rows"])
