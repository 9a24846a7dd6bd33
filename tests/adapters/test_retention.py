"""Which versions are kept for how long, and what goes with one that goes: its memory, its copy, its upload."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from adapters.harness import WAIT_S, lease, managing, quiesce, use
from adapters.test_pushed import accept, upload, with_uploads
from adapters.test_versions import versions_of_a, write_version
from support.checkpoints import write_gralora

from gralora_runtime.adapters.catalogue.catalogue import Retention
from gralora_runtime.adapters.housekeeping import Housekeeping
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.persistence import Persistence
from gralora_runtime.config import EngineConfig
from gralora_runtime.errors import CatalogueError, ConfigError

A_DAY_S = 86_400.0


class Clock:
    """Time as the catalogue sees it."""

    def __init__(self) -> None:
        self.later_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.later_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def numbers(manager: AdapterManager, name: str = "a") -> list[int]:
    return [version.number for version in manager.get(name).versions]


def copies(manager: AdapterManager) -> set[str]:
    """Once all that was to be copied or removed is."""
    store = manager._persistence._copies
    assert store is not None
    store._copying.submit(int).result(WAIT_S)
    return set(store.digests())


@contextmanager
def copied_versions_of_a(root: Path, count: int, **options: Any) -> Iterator[tuple[AdapterManager, list[str]]]:
    """As `versions_of_a`, each copied before its files were overwritten. A day is a long time."""
    options = {"units": 8, "state_dir": root.parent / "state", "retention": Retention(max_age_s=A_DAY_S)} | options
    digests = []
    root.mkdir(exist_ok=True)
    with managing(root, **options) as manager:
        for seed in range(count):
            write_version(root, "a", seed)
            digests.append(manager.load("a").result(WAIT_S).versions[-1].digest)
            assert digests[-1] in copies(manager)
        yield manager, digests


def test_versions_grow_old_though_nothing_changes_and_those_that_matter_do_not(tmp_path: Path, clock: Clock) -> None:
    with versions_of_a(tmp_path, 8, retention=Retention(max_age_s=A_DAY_S), now_s=clock) as (manager, _):
        held = lease(manager, "a@1")
        manager.pin("a@2", True)
        manager.set_canary("a", "3", 0.5)
        clock.later_s = 0.9 * A_DAY_S
        manager.tidy()
        assert numbers(manager) == [1, 2, 3, 4, 5, 6, 7, 8]
        clock.later_s = 1.1 * A_DAY_S
        manager.tidy()
        assert numbers(manager) == [1, 2, 3, 7, 8]  # in use, pinned, canary, previous, promoted
        manager.release(held)
        manager.tidy()
        quiesce(manager)

        assert numbers(manager) == [2, 3, 7, 8]
        assert manager.stats().slots_used == 4


def test_a_use_makes_a_version_young_again(tmp_path: Path, clock: Clock) -> None:
    with versions_of_a(tmp_path, 4, retention=Retention(max_age_s=A_DAY_S), now_s=clock) as (manager, _):
        for number in (1, 2):
            manager._store.get("a").versions[number].created_s -= 2 * A_DAY_S
            manager._store.get("a").versions[number].last_used_s = 0.0
        use(manager, "a@1")
        manager.tidy()

        assert numbers(manager) == [1, 3, 4]


def test_a_copy_goes_with_the_last_version_of_its_content(tmp_path: Path, clock: Clock) -> None:
    root = tmp_path / "adapters"
    with copied_versions_of_a(root, 4, now_s=clock) as (manager, digests):
        write_version(root, "b", 1)  # what the second version of `a` is
        use(manager, "b")
        assert copies(manager) == set(digests)
        clock.later_s = 2 * A_DAY_S
        manager.tidy()

        assert numbers(manager) == [3, 4]
        assert copies(manager) == set(digests[1:])
        assert use(manager, "b").digest == digests[1]
        manager.unload("b")
        assert copies(manager) == set(digests[2:])
    with managing(root, state_dir=tmp_path / "state") as manager:
        assert numbers(manager) == [3, 4]


def test_a_copy_stays_while_nobody_could_write_down_that_its_version_went(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a kill would bring the version back, and nothing that it could be read from."""

    def no_disk(_: Persistence) -> None:
        raise CatalogueError("catalogue", "cannot be written", "see to the disk")

    with copied_versions_of_a(tmp_path / "adapters", 3, now_s=clock) as (manager, digests):
        monkeypatch.setattr(Persistence, "flush", no_disk)
        clock.later_s = 2 * A_DAY_S
        manager.tidy()

        assert numbers(manager) == [2, 3]
        assert copies(manager) == set(digests)
        monkeypatch.undo()
    # The next start finds that nobody has it.
    with managing(tmp_path / "adapters", state_dir=tmp_path / "state") as manager:
        assert copies(manager) == set(digests[1:])


def test_an_upload_goes_with_its_version_but_never_the_newest(tmp_path: Path) -> None:
    with with_uploads(tmp_path, units=8) as (manager, uploads):
        directories = []
        for seed in range(4):
            trained = write_gralora(tmp_path / f"trained-{seed}", r=4, k=2, seed=seed)
            directories.append(upload(uploads, "a", trained))
            manager.load("a", directories[-1]).result(WAIT_S)
            accept(uploads, "a", trained)
        manager.tidy()
        assert all(directory.is_dir() for directory in directories)
        alias = manager._store.get("a")
        manager._catalogue._retention = Retention(max_age_s=-1.0)
        manager.roll_back("a")
        manager.tidy()

        assert (list(alias.versions), alias.promoted) == ([3, 4], 3)
        assert [directory.is_dir() for directory in directories] == [False, False, True, True]
        manager.unload("a")
        manager.tidy()
        assert directories[-1].is_dir()  # a load brings it back
        assert manager.load("a").result(WAIT_S).source == str(directories[-1])


def test_a_copy_that_is_being_made_when_its_version_goes_does_not_stay(tmp_path: Path, clock: Clock) -> None:
    root = tmp_path / "adapters"
    with copied_versions_of_a(root, 1, now_s=clock) as (manager, digests):
        begun, go_on = threading.Event(), threading.Event()
        store = manager._persistence._copies
        assert store is not None
        store._copying.submit(lambda: begun.set() or go_on.wait(WAIT_S))
        assert begun.wait(WAIT_S)
        write_version(root, "b", 7)
        use(manager, "b")  # its copy waits its turn
        manager.unload("b")
        go_on.set()

        assert copies(manager) == set(digests)


# The thread.


def test_what_is_looked_at_now_and_then_is_looked_at_again_though_it_failed() -> None:
    calls = threading.Semaphore(0)

    def tidy() -> None:
        calls.release()
        raise ValueError("a bug")

    housekeeping = Housekeeping(tidy, every_s=0.001)
    assert calls.acquire(timeout=WAIT_S)
    assert calls.acquire(timeout=WAIT_S)
    housekeeping.close()
    assert not housekeeping._thread.is_alive()


def test_closing_does_not_wait_for_the_next_look() -> None:
    calls: list[None] = []
    Housekeeping(lambda: calls.append(None), every_s=3600.0).close()

    assert calls == []


# The settings.


@pytest.mark.parametrize(
    "wrong", [{"keep_versions": 0}, {"keep_versions_days": 0.0}, {"keep_versions_days": float("nan")}]
)
def test_nothing_that_could_not_be_kept_is_a_setting(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineConfig(model=Path("/m"), **wrong)
