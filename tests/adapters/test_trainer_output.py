"""Who names the directory that a training wrote to, and not the checkpoint in it, hears which one to name."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapters.harness import WAIT_S, managing, use, write_units

from gralora_runtime.adapters.catalogue.similar import similar_name
from gralora_runtime.errors import AdapterNotFoundError, AdapterRejectedError


def test_the_checkpoint_is_an_adapter_and_its_directory_is_none(tmp_path: Path) -> None:
    write_units(tmp_path, ["run/checkpoint-500", "run/checkpoint-60"])
    with managing(tmp_path) as manager:
        with pytest.raises(AdapterNotFoundError, match="did you mean 'run/checkpoint-"):
            manager.acquire("run").result(WAIT_S)
        with pytest.raises(AdapterRejectedError, match="is missing; run/checkpoint-500 has one: name that directory"):
            manager.load("mine", Path("run")).result(WAIT_S)
        held = use(manager, "run/checkpoint-500")

        assert manager.load("mine", Path("run/checkpoint-500")).result(WAIT_S).digest == held.digest


def test_a_name_that_is_nearly_the_same_comes_before_what_lies_below_one() -> None:
    names = ["run/checkpoint-1", "runs", "run/other"]

    assert similar_name("run", names) == "runs"
    assert similar_name("run", names[:1]) == "run/checkpoint-1"
    assert similar_name("run", names[2:]) == ""
