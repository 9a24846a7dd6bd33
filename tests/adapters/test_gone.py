"""Directories that are deleted: what a name is served from then, when it leaves the list, and how it comes back."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from adapters.harness import WAIT_S, is_pending, lease, managing, quiesce, until, use, write_units
from adapters.test_persistence import copied
from adapters.test_versions import digest_of, write_version
from support.checkpoints import edit_config

from gralora_runtime.adapters.catalogue.resolver import Resolver
from gralora_runtime.adapters.catalogue.sources.directory import DirectorySource
from gralora_runtime.adapters.catalogue.sources.source import Found
from gralora_runtime.adapters.catalogue.store import GONE, AdapterState
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.errors import AdapterNotFoundError, AdapterRejectedError, AdapterVersionLostError


def names(manager: AdapterManager) -> list[str]:
    return [info.name for info in manager.list()]


def seen(manager: AdapterManager, name: str) -> None:
    """Returns when what a watcher would have told of this name was followed."""
    manager.refresh(name)
    settled(manager)


def settled(manager: AdapterManager) -> None:
    resolver = manager._discovery._resolver
    until(lambda: not resolver._asked and not any(a.refreshing for a in tuple(manager._store.aliases())))
    quiesce(manager)


def forgotten_by_the_pool(manager: AdapterManager, name: str) -> None:
    """Without a host cache, and with room for one."""
    use(manager, "other")
    quiesce(manager)
    assert manager.get(name).state is not AdapterState.RESIDENT


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two adapters, `a` and `other`."""
    write_version(tmp_path / "adapters", "a", 0)
    write_version(tmp_path / "adapters", "other", 9)
    return tmp_path / "adapters"


def test_what_is_in_memory_is_served_on_and_the_list_says_that_its_files_are_gone(root: Path) -> None:
    with managing(root) as manager:
        first = use(manager, "a")
        shutil.rmtree(root / "a")
        seen(manager, "a")
        manager.tidy()

        assert manager.get("a").error == GONE
        again = use(manager, "a")
        assert (again.slot, again.generation, again.digest) == (first.slot, first.generation, first.digest)
        write_version(root, "a", 0)
        seen(manager, "a")
        assert (manager.get("a").error, manager.get("a").version) == ("", 1)


def test_a_name_of_which_nothing_is_left_leaves_the_list_and_its_numbers_go_on(root: Path) -> None:
    with managing(root, units=1, host_units=0) as manager:
        watch = manager.watch("a", lambda: None)
        use(manager, "a")
        shutil.rmtree(root / "a")
        seen(manager, "a")
        forgotten_by_the_pool(manager, "a")
        watch.take(9)
        manager.tidy()
        settled(manager)

        assert names(manager) == ["other"]
        told = watch.take(9)
        assert told is not None
        assert told.removed == ("a",)
        with pytest.raises(AdapterNotFoundError):
            use(manager, "a")
        write_version(root, "a", 1)
        seen(manager, "a")
        assert names(manager) == ["a", "other"]
        held = use(manager, "a")
        assert (held.version, held.digest) == (2, digest_of(root / "a"))
        watch.close()


def test_a_name_that_nobody_has_read_leaves_at_once_and_its_number_meant_nothing(root: Path) -> None:
    with managing(root) as manager:
        for seed in range(2):
            shutil.rmtree(root / "a")
            seen(manager, "a")
            assert names(manager) == ["other"]
            write_version(root, "a", seed)
            seen(manager, "a")

        assert use(manager, "a").version == 1


def test_a_request_that_finds_nothing_left_ends_the_name(root: Path) -> None:
    """Where directories are not watched nobody tells."""
    with managing(root, units=1, host_units=0) as manager:
        use(manager, "a")
        use(manager, "other")
        quiesce(manager)
        shutil.rmtree(root / "a")
        with pytest.raises(AdapterVersionLostError, match=GONE):
            use(manager, "a")

        assert names(manager) == ["other"]


def test_a_copy_keeps_the_name_until_it_has_to_make_room(root: Path, tmp_path: Path) -> None:
    with managing(root, units=1, host_units=0, state_dir=tmp_path / "state") as manager:
        first = use(manager, "a").digest
        until(lambda: copied(manager, "a", 1))
        shutil.rmtree(root / "a")
        seen(manager, "a")
        forgotten_by_the_pool(manager, "a")
        manager.tidy()
        settled(manager)

        assert (manager.get("a").error, use(manager, "a").digest) == (GONE, first)
        forgotten_by_the_pool(manager, "a")
        manager._persistence.drop_copy(first)
        manager.tidy()
        settled(manager)
        assert names(manager) == ["other"]


def test_who_holds_it_or_waits_for_it_keeps_the_name(root: Path) -> None:
    with managing(root, units=1, host_units=0) as manager:
        held = lease(manager, "a")
        shutil.rmtree(root / "a")
        seen(manager, "a")
        other = manager.acquire("other")
        assert is_pending(manager, other)
        manager.tidy()
        settled(manager)
        assert "a" in names(manager)
        manager.release(held)
        manager.release(other.result(WAIT_S))
        quiesce(manager)
        manager.tidy()
        settled(manager)

        assert names(manager) == ["other"]


def test_what_is_pinned_stays_in_the_list_until_it_no_longer_is(root: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with managing(root, state_dir=state, copies_bytes=0) as manager:
        manager.load("a", pin=True).result(WAIT_S)
    shutil.rmtree(root / "a")
    with managing(root, state_dir=state, copies_bytes=0) as manager:
        settled(manager)
        assert manager.get("a").error == GONE
        manager.pin("a", False)
        manager.tidy()
        settled(manager)

        assert names(manager) == ["other"]


def test_what_was_loaded_from_a_path_of_its_own_has_its_files(root: Path) -> None:
    with managing(root, units=1, host_units=0) as manager:
        manager.load("another", root / "a").result(WAIT_S)
        forgotten_by_the_pool(manager, "another")
        seen(manager, "another")

        assert manager.get("another").error == ""
        assert use(manager, "another").digest == digest_of(root / "a")


def test_a_name_that_an_operator_unloaded_stays_so(root: Path, tmp_path: Path) -> None:
    with managing(root, state_dir=tmp_path / "state") as manager:
        use(manager, "a")
        manager.unload("a")
        shutil.rmtree(root / "a")
        seen(manager, "a")
        write_version(root, "a", 1)
        seen(manager, "a")

        assert names(manager) == ["other"]
    with managing(root, state_dir=tmp_path / "state") as manager:
        assert names(manager) == ["other"]
        assert manager.load("a").result(WAIT_S).version == 2


def test_a_load_that_fails_forgets_no_number(root: Path, tmp_path: Path) -> None:
    """A name that was unloaded, and whose load failed, used to begin with 1 again. It stays unloaded."""
    with managing(root, state_dir=tmp_path / "state") as manager:
        use(manager, "a")
        manager.unload("a")
        write_version(root, "a", 1)
        edit_config(root / "a", gralora_k=3)
        with pytest.raises(AdapterRejectedError):
            manager.load("a").result(WAIT_S)
    write_version(root, "a", 2)
    with managing(root, state_dir=tmp_path / "state") as manager:
        with pytest.raises(AdapterNotFoundError):
            use(manager, "a")
        assert manager.load("a").result(WAIT_S).version > 1


# Over a restart.


def test_a_name_of_which_nothing_is_left_is_not_listed_after_a_restart(root: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with managing(root, state_dir=state, copies_bytes=0) as manager:
        use(manager, "a")
    shutil.rmtree(root / "a")
    for _ in range(2):  # the second one finds what the first wrote down
        with managing(root, state_dir=state, copies_bytes=0) as manager:
            settled(manager)
            assert names(manager) == ["other"]
    write_version(root, "a", 1)
    with managing(root, state_dir=state, copies_bytes=0) as manager:
        assert names(manager) == ["a", "other"]
        assert use(manager, "a").version == 2
    with managing(root, state_dir=state, copies_bytes=0) as manager:
        assert [version.number for version in manager.get("a").versions] == [2]


def test_a_name_of_which_a_copy_is_left_is_listed_after_a_restart_and_served(root: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with managing(root, state_dir=state) as manager:
        first = use(manager, "a").digest
        until(lambda: copied(manager, "a", 1))
    shutil.rmtree(root / "a")
    with managing(root, state_dir=state) as manager:
        settled(manager)

        assert manager.get("a").error == GONE
        assert use(manager, "a").digest == first


class Remote:
    """Another machine, which has `far`, and counts how often it is asked."""

    uri, follows = "far://", True

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.asked: list[str] = []

    def find(self, name: str) -> Found | None:
        self.asked.append(name)
        if name != "far":
            return None
        write_units(self.directory, [name])
        return Found(directory=self.directory / name, roots=(self.directory,), revision="1")

    def locate(self, _path: Path) -> Found | None:
        return None

    def names(self) -> Iterable[str]:
        return ()

    def close(self) -> None: ...


def test_other_machines_are_not_asked_at_start_for_what_they_have_for_ever(root: Path, tmp_path: Path) -> None:
    remote = Remote(tmp_path / "downloads")
    options = {"sources": [DirectorySource(root), remote], "state_dir": tmp_path / "state", "copies_bytes": 0}
    with managing(None, **options) as manager:
        use(manager, "far")
    shutil.rmtree(tmp_path / "downloads")
    remote.asked.clear()
    with managing(None, units=1, **options) as manager:
        settled(manager)

        assert "far" in names(manager)
        assert remote.asked == []
        assert use(manager, "far").version == 1


# Watched.


def test_a_watched_directory_that_is_deleted_leaves_the_list_and_comes_back(root: Path) -> None:
    write_version(root, "acme/b", 3)
    with managing(root, watch="auto") as manager:
        watcher = manager._discovery._watcher
        assert watcher is not None
        assert watcher.watching.wait(WAIT_S)
        assert names(manager) == ["a", "acme/b", "other"]
        shutil.rmtree(root / "a")
        shutil.rmtree(root / "acme" / "b")
        until(lambda: names(manager) == ["other"])
        write_version(root, "a", 0)
        write_version(root, "acme/b", 3)
        until(lambda: names(manager) == ["a", "acme/b", "other"])
        (root / "acme").rename(root.parent / "moved")
        until(lambda: names(manager) == ["a", "other"])

        assert use(manager, "a").version == 1


def test_a_watched_directory_that_is_replaced_is_served_in_between(root: Path) -> None:
    replacement = write_version(root.parent / "staged", "a", 1)
    with managing(root, watch="auto") as manager:
        watcher = manager._discovery._watcher
        assert watcher is not None
        assert watcher.watching.wait(WAIT_S)
        first = use(manager, "a").digest
        (root / "a").rename(root.parent / "old")
        until(lambda: manager.get("a").error == GONE)
        assert use(manager, "a").digest == first
        replacement.rename(root / "a")
        until(lambda: manager.get("a").version == 2)

        assert manager.get("a").error == ""
        assert use(manager, "a").digest == digest_of(root / "a") != first


def test_what_a_path_tells_that_leads_nowhere_any_more(tmp_path: Path) -> None:
    (tmp_path / "acme" / "a").mkdir(parents=True)
    (tmp_path / "models--acme--b" / "refs").mkdir(parents=True)
    source = DirectorySource(tmp_path)
    told = {
        "gone": "gone",
        "gone/adapter_config.json": "gone",
        "acme/gone/adapter_config.json": "acme/gone",
        "acme/a/adapter_config.json": "",
        "models--acme--b/refs/main": "acme/b",
        "models--acme--b/refs": "",
        ".": "",
    }

    assert {path: source.gone_at(source.root / path) for path in told} == told
    assert source.gone_at(tmp_path.parent / "elsewhere") == ""


def test_files_that_come_while_they_are_looked_for_are_found(tmp_path: Path) -> None:
    """The answer that was on its way used to be everybody's: the name was absent for a second."""
    write_version(tmp_path / "adapters", "a", 0)
    source = DirectorySource(tmp_path / "adapters")
    late: list[str] = ["a"]

    class Looking(Remote):
        def find(self, name: str) -> Found | None:
            self.asked.append(name)
            if late:
                resolver.appeared(late.pop())
                return None
            return source.find(name)

    looking = Looking(tmp_path)
    resolver = Resolver([looking], now_s=lambda: 0.0)
    assert resolver.resolve("a").result(WAIT_S).found.directory == source.root / "a"
    with pytest.raises(AdapterNotFoundError):
        resolver.resolve("b").result(WAIT_S)
    with pytest.raises(AdapterNotFoundError):
        resolver.resolve("b").result(WAIT_S)
    resolver.close()

    assert looking.asked == ["a", "a", "b"]
