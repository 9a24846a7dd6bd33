"""A customer's machine pushes adapters to a real server, and asks for them with no further command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.broken_adapters import write_broken
from support.peft_adapters import gralora_config, save_adapter
from support.tiny_models import tiny_model

from gralora_server import Client
from gralora_server.client import AdapterState, FailedPreconditionError, NotFoundError

from .conftest import assert_idle, serving

ASKED = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of one kind with different weights, on the customer's machine."""
    root, model = tmp_path_factory.mktemp("customer"), tiny_model("llama")
    return [save_adapter(model, gralora_config("llama", 8, 2), root / f"v{seed}", seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def server(tiny_workspace: Path, state: Path) -> Iterator[str]:
    with serve(tiny_workspace, state) as address:
        yield address


def serve(workspace: Path, state: Path):
    options = ("--threads", "1", "--state-dir", str(state))
    return serving(workspace / "model", workspace / "adapters", *options)


@pytest.fixture
def client(server: str) -> Iterator[Client]:
    with Client(server) as client:
        yield client
        assert_idle(client)


def kept(state: Path) -> set[Path]:
    return {path for path in (state / "uploads").rglob("*") if path.name != ".lock"}


def test_what_was_pushed_answers_and_what_is_pushed_again_is_its_next_version(
    client: Client, trained: list[Path]
) -> None:
    base = client.generate("the quick", **ASKED)
    pushed = client.adapters.push(trained[0], "acme/fox")
    first = client.generate("the quick", adapter="acme/fox", **ASKED)
    again = client.adapters.push(trained[1], "acme/fox", pin=True)
    second = client.generate("the quick", adapter="acme/fox", **ASKED)
    old = client.generate("the quick", adapter="acme/fox@1", **ASKED)

    assert (pushed.state, pushed.version, first.adapter_version) == (AdapterState.RESIDENT, 1, 1)
    assert (again.version, again.pinned, second.adapter_version) == (2, True, 2)
    assert first.adapter_digest == pushed.digest != again.digest == second.adapter_digest
    assert len({base.token_ids, first.token_ids, second.token_ids}) == 3
    assert old.token_ids == first.token_ids


def test_a_push_under_a_name_of_the_operators_directory_comes_first(client: Client, trained: list[Path]) -> None:
    """Whether somebody has read that adapter before, or nobody has."""
    before = client.generate("the quick", adapter="a0", **ASKED)
    for name in ("a0", "a1"):
        client.adapters.push(trained[2], name)
        after = client.generate("the quick", adapter=name, **ASKED)
        assert after.token_ids != before.token_ids
        assert "uploads" in client.adapters.get(name).source


@pytest.mark.parametrize("kind", ["truncated", "wrong-shape", "not-json", "no-weights"])
def test_a_broken_adapter_is_refused_and_leaves_nothing(
    kind: str, client: Client, trained: list[Path], state: Path, tmp_path: Path
) -> None:
    broken = write_broken(trained[0], kind, tmp_path)
    there = kept(state)
    with pytest.raises(FailedPreconditionError) as caught:
        client.adapters.push(broken, "new")
    with pytest.raises(NotFoundError):
        client.adapters.get("new")

    assert caught.value.reason == "ADAPTER_REJECTED"
    assert kept(state) == there


def test_one_that_does_not_answer_its_golden_prompts_is_refused_and_leaves_nothing(
    client: Client, trained: list[Path], state: Path, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(trained[0], tmp_path / "adapter"))
    case = {"prompt_token_ids": [5, 6, 7], "expected_token_ids": [3, 3, 3, 3]}
    (adapter / "golden.json").write_text(json.dumps({"version": 1, "model": "", "cases": [case]}))
    there = kept(state)
    with pytest.raises(FailedPreconditionError, match=r"golden.json: cases\[0\] answers"):
        client.adapters.push(adapter, "tried")
    with pytest.raises(NotFoundError):
        client.adapters.get("tried")
    assert kept(state) == there

    right = client.generate(token_ids=[5, 6, 7], adapter="a0", max_tokens=4, temperature=0.0)
    case["expected_token_ids"] = list(right.token_ids)
    served = Path(shutil.copytree(Path(client.adapters.get("a0").source), tmp_path / "served"))
    (served / "golden.json").write_text(json.dumps({"version": 1, "model": "", "cases": [case]}))
    assert client.adapters.push(served, "tried").version == 2  # 1 is what was refused, for good


@pytest.mark.parametrize("known", [True, False], ids=["read", "unread"])
def test_a_broken_adapter_changes_nothing_for_a_name_that_works(
    known: bool, client: Client, trained: list[Path], tiny_workspace: Path, state: Path, tmp_path: Path
) -> None:
    name = f"works-{known}"
    save_adapter(tiny_model("llama"), gralora_config("llama", 4, 2), tiny_workspace / "adapters" / name, seed=9)
    before = client.generate("the quick", adapter=name, **ASKED) if known else None
    there = kept(state)
    with pytest.raises(FailedPreconditionError):
        client.adapters.push(write_broken(trained[0], "wrong-shape", tmp_path), name)
    described = client.adapters.get(name) if known else None
    after = client.generate("the quick", adapter=name, **ASKED)

    assert kept(state) == there
    assert after.adapter_version == 1
    assert before is None or after.token_ids == before.token_ids
    assert described is None or (described.error, len(described.versions)) == ("", 1)


def test_what_was_pushed_can_be_deleted_and_pushed_again(client: Client, trained: list[Path], state: Path) -> None:
    there = kept(state)
    for version in range(2):
        client.adapters.push(trained[version], "short-lived")
    before = client.generate("the quick", adapter="short-lived", **ASKED)
    client.adapters.unload("short-lived", delete_upload=True)
    assert kept(state) == there
    with pytest.raises(NotFoundError):
        client.generate("the quick", adapter="short-lived", **ASKED)
    again = client.adapters.push(trained[1], "short-lived")
    after = client.generate("the quick", adapter="short-lived", **ASKED)

    assert (before.adapter_version, again.version) == (2, 3)
    assert after.token_ids == before.token_ids
    client.adapters.unload("short-lived", delete_upload=True)


def test_pushed_adapters_are_there_after_a_restart(tiny_workspace: Path, trained: list[Path], tmp_path: Path) -> None:
    with serve(tiny_workspace, tmp_path) as address, Client(address) as client:
        client.adapters.push(trained[0], "acme/fox")
        client.adapters.push(trained[1], "acme/fox")
        before = client.generate("the quick", adapter="acme/fox", **ASKED)
    with serve(tiny_workspace, tmp_path) as address, Client(address) as client:
        listed = {adapter.name for adapter in client.adapters.list()}
        after = client.generate("the quick", adapter="acme/fox", **ASKED)

    assert "acme/fox" in listed
    assert after.token_ids == before.token_ids
    assert after.adapter_digest == before.adapter_digest
