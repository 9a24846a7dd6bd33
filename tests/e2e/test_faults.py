"""Faults of `python -m benchmarks.faults`, over a tiny model: nothing acknowledged is lost, all is well after."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.thorough import MANY

from benchmarks.catalogue.base import Base, base_of, save_tiny_llama
from benchmarks.faults.everything import EVERYTHING
from benchmarks.faults.fault import Fault
from benchmarks.faults.stage import WRONG, Stage


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return base_of("tiny", save_tiny_llama(tmp_path_factory.mktemp("model")))


# One of each sort, none of which counts seconds; all of them where there is time.
ALWAYS = {"kill-engine", "kill-server", "stop-server", "cancel-storm", "no-descriptors"}
ALWAYS |= {"disk-full", "files-truncated", "files-pipe", "clock-forward", "catalogue-garbage", "settings-reloaded"}


@pytest.mark.parametrize(
    "fault", [fault for fault in EVERYTHING if MANY or fault.name in ALWAYS], ids=lambda fault: fault.name
)
def test_fault(base: Base, fault: Fault, tmp_path: Path) -> None:
    stage = Stage(base, tmp_path)
    stage.write_adapters()

    outcome = fault.run(stage)

    assert outcome.is_good, (outcome.lost, outcome.problems)
    assert WRONG not in outcome.saw
