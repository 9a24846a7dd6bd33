"""Whoever waits for a start is told what it does: nothing is silent for two seconds, whatever has to be made first."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.peft_adapters import lora_config
from support.workspaces import save_workspace

from benchmarks.startup import lines_until, longest_silence_s
from gralora_server.cli.progress import BEAT_S, _Lines

ROOT = Path(__file__).parent.parent.parent
LONGEST_S = 2.0
OWN_PROCESSES = 3  # that a start keeps busy


def longest_s() -> float:
    """Of a silence: in proportion longer where strangers want the cores, since whoever should speak waits for one."""
    others = max(os.getloadavg()[:2]) - OWN_PROCESSES
    return LONGEST_S * max(1.0, others / (os.cpu_count() or 1))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which no model was converted and no kernel compiled."""
    folder = tmp_path_factory.mktemp("caches")
    return os.environ | {"GRALORA_CACHE": str(folder / "models"), "NUMBA_CACHE_DIR": str(folder / "kernels")}


@pytest.mark.alone
def test_serve_is_never_silent_for_long_though_all_kernels_have_to_be_compiled(caches, tmp_path: Path) -> None:
    save_workspace(tmp_path, {"one": lora_config("llama", 4)})
    command = [sys.executable, "-c", "from gralora_server.cli import main; main()", "serve", "--address", "127.0.0.1:0"]

    said = lines_until(
        "SERVING", [*command, "--model", tmp_path / "model", "--adapters", tmp_path / "adapters"], caches
    )

    text = "\n".join(line.text for line in said)
    assert longest_silence_s(said) < longest_s(), text
    for family in ("products", "attention", "adapters", "steps"):
        assert f"Kernels: {family}: compiled" in text
    for stage in ("Libraries", "Model: weights", "Adapters: which there are"):
        assert f"{stage}: " in text


@pytest.mark.alone
@pytest.mark.slow
def test_the_demo_is_never_silent_for_long_before_it_asks(caches) -> None:
    """The model is converted meanwhile."""
    said = lines_until("3 of 4", [sys.executable, ROOT / "examples" / "demo.py"], caches)

    text = "\n".join(line.text for line in said)
    assert longest_silence_s(said) < longest_s(), text
    for step in ("1 of 4", "Writing safetensors: ", "2 of 4", "Kernels: steps: "):
        assert step in text


def test_a_stage_is_told_of_every_second_and_when_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines = _Lines(said.append)

    with lines.stage("Weights") as tell:
        lines.beat()
        assert said == []
        now[0] += BEAT_S
        lines.beat()
        lines.beat()
        tell(done=3, total=8)
        now[0] += BEAT_S
        lines.beat()
        tell("cached")
    with lines.stage("Quick"):
        pass

    assert said == ["Weights: 1 s so far", "Weights: 3 of 8, 2 s so far", "Weights: cached, 2.0 s", "Quick: 0.0 s"]


def test_a_stage_that_fails_is_not_said_to_have_ended() -> None:
    said: list[str] = []
    lines = _Lines(said.append)

    with pytest.raises(OSError, match="gone"), lines.stage("Weights"):
        raise OSError("gone")
    lines.beat()

    assert said == []


def test_a_quiet_command_of_the_makefile_is_told_of_and_its_failure_shown() -> None:
    script = ROOT / "scripts" / "told.py"
    command = [sys.executable, "-c", "print('no such package'); raise SystemExit(3)"]

    done = subprocess.run([sys.executable, script, "Set-up", *command], capture_output=True, text=True, check=False)

    assert done.returncode == 3
    assert done.stdout.startswith("Set-up: 0 s so far")
    assert "failed with 3" in done.stdout
    assert done.stdout.rstrip().endswith("no such package")
