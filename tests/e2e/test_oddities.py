"""An operator hears of adapters that a real server serves although something is odd about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftConfig
from support.checkpoints import edit_config, edit_tensors
from support.peft_adapters import gralora_config
from support.workspaces import save_workspace
from torch import Tensor

from e2e.conftest import serving
from gralora_runtime.adapters.checkpoint.doubts import CHANGES_NOTHING
from gralora_server import Client
from gralora_server.cli.app import run
from gralora_server.cli.output import ExitCode
from gralora_server.client import AdapterState

NAMES = ("usual", "untrained", "huge", "foreign")
OTHER = "its config names the base model 'owner/other', and this one is called 'model'"
ONE_ADAPTER = ("--host-cache-bytes", "0", "--max-adapter-slots", "1", "--threads", "1")


def multiplied(size: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.mul_(size if "_B" in name else 1.0)

    return change


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Four adapters of one kind, three of them odd."""
    configs: dict[str, PeftConfig] = {name: gralora_config("llama", 8, 2) for name in NAMES}
    workspace = save_workspace(tmp_path, configs)
    folders = {name: workspace / "adapters" / name for name in NAMES}
    for name, size in (("usual", 0.01), ("untrained", 0.0), ("huge", 1e4), ("foreign", 0.01)):
        edit_tensors(folders[name], multiplied(size))
    edit_config(folders["usual"], base_model_name_or_path="owner/Model")
    edit_config(folders["foreign"], base_model_name_or_path="owner/other")
    return workspace


def test_what_is_odd_is_told_in_lists_by_the_client_and_once_in_the_log(
    workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(workspace / "model", workspace / "adapters", *ONE_ADAPTER) as address, Client(address) as client:
        assert {one.name: one.warnings for one in client.adapters.list() if one.warnings} == {"foreign": (OTHER,)}
        for _ in range(2):
            for name in NAMES:
                client.generate("the quick", adapter=name, max_tokens=1)
        states = [one.state for one in client.adapters.list()]
        listed = {one.name: one.warnings for one in client.adapters.list()}
        got = {name: client.adapters.get(name) for name in NAMES}
        log = capfd.readouterr().err
        assert run(["adapters", "list", "--address", address]) == ExitCode.OK
        table = capfd.readouterr().out
        assert run(["adapters", "versions", "huge", "--address", address]) == ExitCode.OK
        versions = capfd.readouterr().out
    (huge,) = listed["huge"]

    assert (states.count(AdapterState.RESIDENT), states.count(AdapterState.REGISTERED)) == (1, 3)  # each was read twice
    assert listed == {"usual": (), "untrained": (CHANGES_NOTHING,), "huge": (huge,), "foreign": (OTHER,)}
    assert {name: one.warnings for name, one in got.items()} == listed
    assert all(one.versions[0].warnings == one.warnings for one in got.values())
    assert [line.split()[-1] for line in table.splitlines()[1:5]] == ["1", "1", "1", got["usual"].digest[:8]]
    assert f"huge@1: {huge}" in versions
    for name in NAMES:
        lines = [line for line in log.splitlines() if f"{name}@1: " in line]
        assert len(lines) == len(listed[name])
        assert all(sentence in lines[0] for sentence in listed[name])
    assert run(inspection(workspace, "huge")) == ExitCode.OK
    assert json.loads(capfd.readouterr().out)["warnings"] == [huge]


def inspection(workspace: Path, name: str) -> list[str]:
    paths = [str(workspace / "adapters" / name), "--model", str(workspace / "model")]
    return ["adapters", "inspect", *paths, "--weights", "--json"]
