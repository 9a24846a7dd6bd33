"""A manager tells of adapters that it serves although something is odd about them, and reads few of them twice."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from adapters.harness import WAIT_S, Gate, managing, use
from support.checkpoints import MODULES, edit_tensors, write_gralora

from gralora_runtime.adapters import oddities
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.checkpoint.bounds import closer_bound
from gralora_runtime.adapters.checkpoint.doubts import CHANGES_NOTHING, FAR_OUTSIDE, about_weights
from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.adapters.checkpoint.update import norm
from gralora_runtime.adapters.checkpoint.whole import WholeAdapter, read_whole

NORMS = {module.name: 1e3 for module in MODULES}  # a unit's updates are a tenth to a quarter of it
OTHER = "its config names the base model 'owner/other', and this one is called 'toy'"


@pytest.fixture
def read_again(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories whose files were read a second time."""
    read: list[str] = []

    def counted(path: Path, *args: object, **options: object) -> WholeAdapter:
        read.append(path.name)
        return read_whole(path, *args, **options)

    monkeypatch.setattr(oddities, "read_whole", counted)
    return read


def write_unit(root: Path, name: str, *, size: float = 1.0, seed: int = 0, **config: object) -> Path:
    """One of the harness's units, with B multiplied."""

    def resized(tensors: dict[str, torch.Tensor]) -> None:
        for tensor_name, tensor in tensors.items():
            tensor.mul_(size if "_B" in tensor_name else 1.0)

    return edit_tensors(write_gralora(root / name, r=4, k=2, seed=seed, **config), resized)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_usual_adapter_is_not_told_of(tmp_path: Path, caplog, read_again: list[str]) -> None:
    write_unit(tmp_path, "usual", base_model_name_or_path="owner/toy")
    with managing(tmp_path, base_norms=NORMS) as manager:
        use(manager, "usual")
        info = manager.get("usual")

    assert info.warnings == info.versions[0].warnings == ()
    assert (warned(caplog), read_again) == ([], [])


@pytest.mark.parametrize("untrained", [{"size": 0.0}, {"size": -0.0}, {"alpha": 0}], ids=str)
def test_one_that_changes_nothing_is_told_of_and_read_once(
    untrained: dict[str, float], tmp_path: Path, caplog, read_again: list[str]
) -> None:
    write_unit(tmp_path, "untrained", **untrained)
    with managing(tmp_path, base_norms=NORMS) as manager:
        assert manager.get("untrained").warnings == ()  # nobody has read its weights
        use(manager, "untrained")

        assert manager.get("untrained").warnings == (CHANGES_NOTHING,)
    assert warned(caplog) == [f"untrained@1: {CHANGES_NOTHING}"]
    assert read_again == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_far_outside_is_told_of_with_the_numbers_of_its_files(
    dtype: torch.dtype, tmp_path: Path, caplog, read_again: list[str]
) -> None:
    path = write_unit(tmp_path, "huge", size=1e4)
    (expected,) = about_weights(read_whole(path).updates(), NORMS)
    with managing(tmp_path, base_norms=NORMS, dtype=dtype) as manager:
        use(manager, "huge")

        assert manager.get("huge").warnings == (expected,)
    assert warned(caplog) == [f"huge@1: {expected}"]
    assert read_again == ["huge"]


@pytest.mark.parametrize(
    ("decided_by", "times_read_again", "num_warnings"), [("bound", 0, 0), ("closer", 0, 0), ("exact", 1, 0), ("", 1, 1)]
)
def test_files_are_read_again_only_if_nothing_else_decides(
    decided_by: str, times_read_again: int, num_warnings: int, tmp_path: Path, read_again: list[str]
) -> None:
    path = write_unit(tmp_path, "a")
    adapter = load("a", path, MODULES, torch.float32, max_width=256)
    entries = dict(adapter.layout.modules)
    sizes = {
        "bound": max(adapter.bounds),
        "closer": max(closer_bound(adapter.blob, module, entries[module.name]) for module in MODULES),
        "exact": max(norm(update) for update in read_whole(path, MODULES).updates().values()),
        "": 1.0,
    }
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    base_norm = 1.01 * sizes[decided_by] / FAR_OUTSIDE
    with managing(tmp_path, base_norms={module.name: base_norm for module in MODULES}) as manager:
        use(manager, "a")

        assert len(manager.get("a").warnings) == num_warnings
    assert len(read_again) == times_read_again


def test_another_base_model_is_told_of_before_weights_are_read_and_logged_when_they_are(tmp_path: Path, caplog) -> None:
    write_unit(tmp_path, "foreign", size=0.0, base_model_name_or_path="owner/other")
    with managing(tmp_path, base_norms=NORMS) as manager:
        assert manager.get("foreign").warnings == (OTHER,)
        assert warned(caplog) == []
        use(manager, "foreign")

        assert manager.get("foreign").warnings == (OTHER, CHANGES_NOTHING)
    assert warned(caplog) == [f"foreign@1: {OTHER}; {CHANGES_NOTHING}"]


def test_a_version_is_logged_once_however_often_it_is_read(
    tmp_path: Path, caplog, gate: Gate, read_again: list[str]
) -> None:
    write_unit(tmp_path, "huge", size=1e4)
    write_unit(tmp_path, "usual", seed=1)
    with managing(tmp_path, units=1, host_units=0, base_norms=NORMS) as manager:
        for name in ("huge", "usual", "huge"):
            use(manager, name)
        warnings = manager.get("huge").warnings
        manager.load("huge").result(WAIT_S)

        assert gate.names == ["huge", "usual", "huge", "huge"]
        assert len(warnings) == 1
        assert manager.get("huge").warnings == warnings
    assert warned(caplog) == [f"huge@1: {warnings[0]}"]


def test_each_version_has_warnings_of_its_own(tmp_path: Path, caplog) -> None:
    write_unit(tmp_path, "a", size=0.0)
    with managing(tmp_path, base_norms=NORMS) as manager:
        use(manager, "a")
        write_unit(tmp_path, "a", seed=1)
        now = manager.load("a").result(WAIT_S)

        assert (now.version, now.warnings) == (2, ())
        assert [version.warnings for version in manager.get("a").versions] == [(CHANGES_NOTHING,), ()]
        assert manager.roll_back("a").warnings == (CHANGES_NOTHING,)
    assert warned(caplog) == [f"a@1: {CHANGES_NOTHING}"]


def test_files_that_changed_before_they_were_read_again_are_not_told_of(
    tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the pool is not what they hold any more; whoever reads them next will tell."""
    write_unit(tmp_path, "huge", size=1e4)

    def changed(*args: object, **options: object) -> WholeAdapter:
        write_unit(tmp_path, "huge", size=2e4)
        return read_whole(*args, **options)

    monkeypatch.setattr(oddities, "read_whole", changed)
    with managing(tmp_path, base_norms=NORMS) as manager:
        use(manager, "huge")

        assert manager.get("huge").state is AdapterState.RESIDENT
        assert manager.get("huge").warnings == ()
    assert warned(caplog) == []
