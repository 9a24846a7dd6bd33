"""The benchmark of starts, as little of it as there can be; and what it reads in a start's output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.peft_adapters import lora_config
from support.workspaces import save_workspace

from benchmarks import startup
from benchmarks.startup import COLD, LATER, STAGE, Line, Start

ROOT = Path(__file__).parent.parent.parent
AT = "2026-11-30 12:00:00,000 INFO gralora_server.start: "


@pytest.mark.alone
def test_a_quick_run_starts_with_an_empty_cache_and_with_the_one_that_it_filled(tmp_path: Path) -> None:
    workspace = save_workspace(tmp_path, {"one": lora_config("llama", 4)})
    out = tmp_path / "startup.json"
    command = [sys.executable, "-m", "benchmarks.startup", "--quick", "--model", str(workspace / "model")]
    command += ["--adapters", str(workspace / "adapters"), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300, capture_output=True)

    found = json.loads(out.read_text())
    (cold_s,), (later_s,) = (found["starts"][name]["serving_s"] for name in (COLD, LATER))
    assert cold_s > later_s > 0
    stages = [found["starts"][name]["stages_s"] for name in (COLD, LATER)]
    assert {"Libraries", "Model: weights", "Kernels: products", "Kernels: steps"} <= stages[0].keys() & stages[1].keys()
    assert stages[0]["Kernels: products"] > stages[1]["Kernels: products"]
    assert len(found["gates"]) == 3


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        (AT + "Libraries: 3.1 s", ("Libraries", "3.1")),
        (AT + "Kernels: products: compiled, 9.0 s", ("Kernels: products", "9.0")),
        (AT + "Model: weights: 3 of 8, 2.0 s", ("Model: weights", "2.0")),
        (AT + "Kernels: products: 9 s so far", None),
        ("SERVING on 127.0.0.1:1", None),
    ],
)
def test_a_stage_is_counted_when_it_has_ended(line: str, stage: tuple[str, str] | None) -> None:
    found = STAGE.search(line)
    assert (found and found.groups()) == stage


def test_a_silence_begins_with_the_process() -> None:
    assert startup.longest_silence_s([Line(1.5, "a"), Line(2.0, "b"), Line(2.5, "c")]) == 1.5


def test_the_slowest_start_and_the_longest_silence_are_judged() -> None:
    starts = {
        COLD: [Start(serving_s=s, longest_silence_s=1.0, stages_s={}) for s in (18.0, 21.0)],
        LATER: [Start(serving_s=5.0, longest_silence_s=s, stages_s={}) for s in (0.5, 1.9)],
    }

    assert [(gate.found, gate.passed) for gate in startup.judge(starts)] == [(21.0, False), (5.0, True), (1.9, True)]


def test_a_start_that_fails_says_what_it_said() -> None:
    with pytest.raises(RuntimeError, match="never said SERVING:\nno such model"):
        startup.lines_until("SERVING", [sys.executable, "-c", "print('no such model')"], {})
