"""What a manager remembers over a restart: names, versions, promotions, pins, and content that was overwritten."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from adapters.harness import WAIT_S, managing, quiesce, until, use
from adapters.test_versions import digest_of, write_version
from support.checkpoints import edit_config

from gralora_runtime.adapters.catalogue.content import ContentStore
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.checkpoint.header import files_stamp
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.residency.mover import NUM_READERS
from gralora_runtime.errors import (
    AdapterCapacityError,
    AdapterNotFoundError,
    AdapterRejectedError,
    AdapterVersionLostError,
    CatalogueError,
)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    adapters, state = tmp_path / "adapters", tmp_path / "state"
    adapters.mkdir()
    return adapters, state


def copied(manager: AdapterManager, name: str, number: int) -> bool:
    return manager._store.get(name).versions[number].copy is not None


def test_a_restart_changes_nothing(places: tuple[Path, Path]) -> None:
    root, state = places
    for name in ("a", "b", "c"):
        write_version(root, name, ord(name))
    options: dict[str, Any] = {"units": 8, "state_dir": state}
    with managing(root, **options) as manager:
        first = use(manager, "a").digest
        until(lambda: copied(manager, "a", 1))
        write_version(root, "a", 1)
        second = manager.load("a").result(WAIT_S).digest
        manager.roll_back("a")
        manager.set_canary("a", "2", 0.25)
        manager.pin("a", True)
        use(manager, "b")
        manager.unload("b")
        quiesce(manager)
        before = manager.get("a")
    with managing(root, **options) as manager:
        after = manager.get("a")

        assert (after.version, after.previous, after.pinned, after.canary) == (1, 2, True, before.canary)
        assert [(v.number, v.digest, v.created_s) for v in after.versions] == [
            (v.number, v.digest, v.created_s) for v in before.versions
        ]
        assert after.last_used_s == before.last_used_s > 0
        assert [first, second] == [use(manager, f"a@{number}").digest for number in (1, 2)]
        with pytest.raises(AdapterNotFoundError):
            use(manager, "b")
        assert manager.get("c").state is AdapterState.REGISTERED
        assert manager.load("b").result(WAIT_S).version == 2  # the first one's number means that one for ever
    with managing(root, **options) as manager:
        assert use(manager, "b").name == "b"


def test_what_changed_while_the_server_was_away_is_seen_and_what_did_not_is_not_read(
    places: tuple[Path, Path], gate: Any
) -> None:
    root, state = places
    for name in ("a", "b"):
        write_version(root, name, ord(name))
    with managing(root, state_dir=state) as manager:
        use(manager, "a")
        use(manager, "b")
        quiesce(manager)
    write_version(root, "a", 7)
    gate.names.clear()
    with managing(root, state_dir=state) as manager:
        until(lambda: manager.get("a").version == 2)
        quiesce(manager)

        assert gate.names.count("b") == 1  # to warm the pool, and not to see whether it changed
        assert use(manager, "a").digest == digest_of(root / "a")


def test_a_start_brings_what_is_pinned_and_then_what_was_used_last(places: tuple[Path, Path]) -> None:
    """Into a pool of two: the pinned one, and of the others the one that was used last."""
    root, state = places
    for name in "abcd":
        write_version(root, name, ord(name))
    with managing(root, units=4, state_dir=state) as manager:
        for name in "abcd":
            use(manager, name)
            time.sleep(0.002)  # times of use differ
        manager.pin("b", True)
    with managing(root, units=2, state_dir=state) as manager:
        until(lambda: manager.get("d").state is AdapterState.RESIDENT)
        quiesce(manager)
        states = {info.name: info.state for info in manager.list()}

        assert states["b"] is states["d"] is AdapterState.RESIDENT
        assert states["a"] is states["c"] is AdapterState.REGISTERED
        assert manager.stats().evictions == 0


def test_who_asks_is_served_before_the_pool_is_warm(places: tuple[Path, Path], gate: Any) -> None:
    root, state = places
    names = [f"a{i:02}" for i in range(24)]
    for i, name in enumerate(names):
        write_version(root, name, i)
    with managing(root, units=30, state_dir=state) as manager:
        for name in names:
            use(manager, name)
        quiesce(manager)
    gate.names.clear()
    gate.shut()
    with managing(root, units=30, state_dir=state) as manager:
        until(lambda: len(manager._mover._to_read_last) == len(names) - NUM_READERS)
        last = list(manager._mover._to_read_last)[-1].name
        wanted = manager.acquire(last)
        gate.open()
        manager.release(wanted.result(WAIT_S))
        quiesce(manager)

        assert gate.names.index(last) < 10  # behind those that were being read, and beside the next ones
        assert sorted(gate.names) == names


def test_a_version_whose_files_were_overwritten_can_be_promoted_again(places: tuple[Path, Path]) -> None:
    """Without room in memory for it, so that it has to come from its copy."""
    root, state = places
    write_version(root, "a", 0)
    with managing(root, units=1, host_units=0, state_dir=state) as manager:
        first = use(manager, "a").digest
        until(lambda: copied(manager, "a", 1))
        write_version(root, "a", 1)
        assert manager.load("a").result(WAIT_S).version == 2
        assert use(manager, "a").digest != first
        manager.roll_back("a")

        assert use(manager, "a").digest == first
        assert {entry.name for entry in (state / "versions").iterdir()} >= {first, "tmp"}


def test_a_damaged_copy_is_never_served(places: tuple[Path, Path]) -> None:
    root, state = places
    path = write_version(root, "a", 0)
    with managing(root, units=1, host_units=0, state_dir=state) as manager:
        first = use(manager, "a").digest
        until(lambda: copied(manager, "a", 1))
        other = write_version(root, "b", 5)
        (state / "versions" / first / WEIGHTS_FILE).write_bytes((other / WEIGHTS_FILE).read_bytes())
        use(manager, "b")
        with pytest.raises(AdapterVersionLostError, match="damaged"):
            use(manager, "a")

        assert use(manager, "a").digest == first == digest_of(path)  # its directory still has it
        assert not (state / "versions" / first / WEIGHTS_FILE).exists() or copied(manager, "a", 1)


def test_a_copy_that_made_room_leaves_the_directory_to_read_from(places: tuple[Path, Path]) -> None:
    """And what has no other place any more is lost, and said so."""
    root, state = places
    write_version(root, "a", 0)
    write_version(root, "b", 5)
    with managing(root, units=1, host_units=0, state_dir=state) as manager:
        first = use(manager, "a").digest
        until(lambda: copied(manager, "a", 1))
        shutil.rmtree(state / "versions" / first)
        use(manager, "b")
        assert use(manager, "a").digest == first
        write_version(root, "a", 1)
        second = manager.load("a").result(WAIT_S).digest
        until(lambda: copied(manager, "a", 2))
        with pytest.raises(AdapterVersionLostError):
            use(manager, "a@1")

        assert use(manager, "a").digest == second


def test_a_copy_that_a_kill_prevented_is_made_when_the_adapter_is_read_again(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files had been seen, so that nobody used to think of it any more."""
    root, state = places
    write_version(root, "a", 0)
    with managing(root, state_dir=state) as manager, monkeypatch.context() as patch:
        patch.setattr(ContentStore, "_keep", lambda *_: None)
        first = use(manager, "a").digest
    with managing(root, units=1, host_units=0, state_dir=state) as manager:
        use(manager, "a")
        until(lambda: copied(manager, "a", 1))
        write_version(root, "a", 1)
        assert manager.load("a").result(WAIT_S).version == 2

        assert use(manager, "a@1").digest == first


def test_a_load_that_fails_leaves_an_unloaded_name_unloaded_and_its_numbers_what_they_were(
    places: tuple[Path, Path],
) -> None:
    """The next load used to begin with number 1 again, and a request to bring the name back."""
    root, state = places
    path = write_version(root, "a", 0)
    with managing(root, state_dir=state) as manager:
        use(manager, "a")
        manager.unload("a")
        edit_config(path, gralora_k=3)
        with pytest.raises(AdapterRejectedError):
            manager.load("a").result(WAIT_S)
        write_version(root, "a", 1)
        with pytest.raises(AdapterNotFoundError):
            use(manager, "a")
    with managing(root, state_dir=state) as manager:
        with pytest.raises(AdapterNotFoundError):
            use(manager, "a")
        assert manager.load("a").result(WAIT_S).version > 1


def test_a_name_that_found_no_room_is_not_there_after_a_restart(places: tuple[Path, Path]) -> None:
    """It had been read by then, and used to be written down."""
    root, state = places
    with managing(root, units=1, state_dir=state) as manager:
        write_version(root, "a", 0)
        manager.load("a", pin=True).result(WAIT_S)
        path = write_version(root, "b", 1)
        manager.refresh("b")
        with pytest.raises(AdapterCapacityError):
            manager.load("c", path).result(WAIT_S)
    with managing(root, units=1, state_dir=state) as manager:
        assert [info.name for info in manager.list()] == ["a", "b"]


def test_an_adapter_that_only_comes_back_is_written_down_once(places: tuple[Path, Path]) -> None:
    root, state = places
    for name in "ab":
        write_version(root, name, ord(name))
    with managing(root, units=1, host_units=0, state_dir=state, copies_bytes=0) as manager:
        for name in "abab":
            use(manager, name)
        recorder = manager._persistence._recorder
        assert recorder is not None
        manager.flush()
        noted = recorder._noted
        for name in "abab":
            use(manager, name)

        assert manager.stats().loads == 8
        assert recorder._noted == noted


def test_a_second_server_is_refused_the_same_state(places: tuple[Path, Path]) -> None:
    root, state = places
    with managing(root, state_dir=state), pytest.raises(CatalogueError), managing(root, state_dir=state):
        pass


def test_a_directory_that_is_gone_is_served_from_its_copy(places: tuple[Path, Path]) -> None:
    root, state = places
    path = write_version(root, "a", 0)
    with managing(root, state_dir=state) as manager:
        first = use(manager, "a").digest
        until(lambda: copied(manager, "a", 1))
        manager.flush()
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    with managing(root, state_dir=state) as manager:
        assert use(manager, "a").digest == first


# The copies themselves.


def kept(store: ContentStore, digest: str, directory: Path, stamp: object = None) -> list[Path]:
    done: list[Path] = []
    store.keep(digest, directory, (directory,), stamp or files_stamp(directory), lambda _, copy: done.append(copy))
    store._copying.submit(int).result(WAIT_S)
    return done


def test_files_that_are_not_what_was_read_are_not_copied(places: tuple[Path, Path]) -> None:
    root, state = places
    path = write_version(root, "a", 0)
    stamp = files_stamp(path)
    edit_config(path, gralora_dropout=0.5)
    store = ContentStore(state, budget_bytes=1 << 30)

    assert kept(store, "d1", path, stamp) == []
    assert store.find("d1") is None
    assert kept(store, "d1", path) == [state / "d1"] == [store.find("d1")]
    store.close()


def test_copies_stay_within_their_budget_and_those_that_matter_stay_longest(places: tuple[Path, Path]) -> None:
    root, state = places
    paths = [write_version(root, f"a{i}", i) for i in range(4)]
    size = sum(file.stat().st_size for file in paths[0].iterdir())
    store = ContentStore(state, budget_bytes=3 * size + 100, needed=lambda digest: digest == "d0")
    for i, path in enumerate(paths[:3]):
        assert kept(store, f"d{i}", path)
    store.find("d1")
    assert kept(store, "d3", paths[3])
    assert [store.find(f"d{i}") is not None for i in range(4)] == [True, True, False, True]
    store.close()

    (state / "tmp" / "d9").mkdir()
    again = ContentStore(state, budget_bytes=3 * size + 100)
    assert [again.find(f"d{i}") is not None for i in range(4)] == [True, True, False, True]
    assert list((state / "tmp").iterdir()) == []
    again.close()


def test_a_pin_that_was_taken_back_does_not_return_though_nobody_could_read_the_adapter(
    places: tuple[Path, Path],
) -> None:
    root, state = places
    edit_config(write_version(root, "a", 0), r=0)
    for pinned in (True, False):
        with managing(root, state_dir=state) as manager:
            assert manager.get("a").pinned != pinned
            manager.pin("a", pinned)
    with managing(root, state_dir=state) as manager:
        assert not manager.get("a").pinned
