"""Which version a name stands for: files that change, promotions, rollbacks, canaries, and what is kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from adapters.harness import UNIT_BYTES, WAIT_S, Gate, lease, managing, quiesce, until, use, weights, write_units
from support.checkpoints import MODULES, edit_config, write_gralora

from gralora_runtime.adapters.catalogue.catalogue import Retention
from gralora_runtime.adapters.catalogue.resolver import ABSENT_S
from gralora_runtime.adapters.catalogue.sources.directory import DirectorySource
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.errors import (
    AdapterBusyError,
    AdapterNotFoundError,
    AdapterRejectedError,
    AdapterVersionLostError,
    AdapterVersionNotFoundError,
    InvalidRequestError,
)


def write_version(root: Path, name: str, seed: int) -> Path:
    """One unit; another content for each seed. Put in place as a whole, as careful people do."""
    fresh = write_gralora(root.parent / f"{root.name}-{name.replace('/', '-')}-{seed}", r=4, k=2, seed=seed)
    target = root / name
    target.parent.mkdir(exist_ok=True, parents=True)
    for file in fresh.iterdir():
        target.mkdir(exist_ok=True)
        file.replace(target / file.name)
    fresh.rmdir()
    return target


def digest_of(path: Path) -> str:
    return load("x", path, MODULES, torch.float32, max_width=256).digest


@contextmanager
def versions_of_a(root: Path, count: int = 2, **options: Any) -> Iterator[tuple[AdapterManager, list[str]]]:
    """A manager whose adapter `a` has had so many contents, and their digests."""
    write_version(root, "a", 0)
    with managing(root, **({"units": 8} | options)) as manager:
        digests = [use(manager, "a").digest]
        for seed in range(1, count):
            write_version(root, "a", seed)
            manager.load("a").result(WAIT_S)
            digests.append(digest_of(root / "a"))
        yield manager, digests


def test_new_content_is_served_at_once_and_streams_end_on_what_they_began_with(tmp_path: Path) -> None:
    write_version(tmp_path, "a", 0)
    with managing(tmp_path, units=4) as manager:
        old = lease(manager, "a")
        before = weights(manager, old).clone()
        write_version(tmp_path, "a", 1)
        assert manager.load("a").result(WAIT_S).version == 2
        new = lease(manager, "a")

        assert [(old.version, new.version)] == [(1, 2)]
        assert old.slot != new.slot  # both may share a step
        assert torch.equal(before, weights(manager, old))
        assert torch.equal(weights(manager, new), load("a", tmp_path / "a", MODULES, torch.float32, max_width=256).blob)
        manager.release(old)
        manager.release(new)


def test_a_version_is_named_by_number_or_by_content(tmp_path: Path) -> None:
    with versions_of_a(tmp_path) as (manager, digests):
        assert digests == [use(manager, f"a@{number}").digest for number in (1, 2)]
        assert digests == [use(manager, f"a@sha256:{digest[:12]}").digest for digest in digests]
        assert digests == [use(manager, f"a@sha256:{digest}").digest for digest in digests]
        assert use(manager, "a").digest == digests[1]


@pytest.mark.parametrize("version", ["3", "sha256:000000000000"])
def test_a_version_that_there_is_not_is_refused_and_named(tmp_path: Path, version: str) -> None:
    with versions_of_a(tmp_path) as (manager, _):
        with pytest.raises(AdapterVersionNotFoundError, match="it has 1, 2"):
            lease(manager, f"a@{version}")
        with pytest.raises(AdapterVersionNotFoundError):
            manager.promote("a", version)


def test_content_that_turns_out_to_be_another_is_not_served_under_its_digest(tmp_path: Path) -> None:
    """Nobody has read the files when the request comes, so only reading them can tell."""
    write_version(tmp_path, "a", 0)
    digest = digest_of(tmp_path / "a")
    with managing(tmp_path) as manager:
        with pytest.raises(AdapterVersionNotFoundError):
            lease(manager, f"a@sha256:{'0' * 12}")
        assert manager.stats().leases == 0

        assert use(manager, f"a@sha256:{digest[:20]}").digest == digest


def test_rolling_back_lasts_until_the_files_change_again(tmp_path: Path) -> None:
    with versions_of_a(tmp_path) as (manager, digests):
        assert manager.roll_back("a").version == 1
        assert use(manager, "a").digest == digests[0]
        assert manager.load("a").result(WAIT_S).version == 1  # the same files as before: nothing new
        assert manager.roll_back("a").version == 2
        assert manager.roll_back("a").version == 1
        write_version(tmp_path, "a", 9)

        assert manager.load("a").result(WAIT_S).version == 3


def test_there_is_nothing_to_roll_back_to_at_first(tmp_path: Path) -> None:
    with versions_of_a(tmp_path, 1) as (manager, _), pytest.raises(InvalidRequestError, match="no earlier version"):
        manager.roll_back("a")


def test_a_source_that_does_not_follow_waits_for_a_promotion(tmp_path: Path) -> None:
    write_version(tmp_path, "a", 0)
    with managing(None, sources=[DirectorySource(tmp_path, follows=False)], units=4) as manager:
        first = use(manager, "a")
        write_version(tmp_path, "a", 1)
        loaded = manager.load("a").result(WAIT_S)

        assert (loaded.version, [version.number for version in loaded.versions]) == (1, [1, 2])
        assert use(manager, "a").digest == first.digest
        assert manager.promote("a").version == 2  # the newest
        assert use(manager, "a").digest == digest_of(tmp_path / "a") != first.digest
        assert manager.promote("a", f"sha256:{first.digest[:12]}").version == 1


def test_a_canary_has_its_share_and_each_key_its_side(tmp_path: Path) -> None:
    with versions_of_a(tmp_path) as (manager, digests):
        manager.set_canary("a", "1", 0.25)
        keys = [f"user-{i}" for i in range(400)]

        def served(key: str) -> str:
            held = manager.acquire("a", key).result(WAIT_S)
            manager.release(held)
            return held.digest

        first = [served(key) for key in keys]
        assert 60 < first.count(digests[0]) < 140  # 100 expected, 8.7 is one standard deviation
        assert first == [served(key) for key in keys]
        assert use(manager, "a@2").digest == digests[1]  # who names a version gets it
        manager.set_canary("a", "1", 0.5)
        assert all(served(key) == digests[0] for key, got in zip(keys, first, strict=True) if got == digests[0])
        manager.set_canary("a", "", 0.0)
        assert {served(key) for key in keys} == {digests[1]}


def test_a_canary_that_is_promoted_is_no_canary_any_more(tmp_path: Path) -> None:
    with versions_of_a(tmp_path) as (manager, _):
        with pytest.raises(InvalidRequestError, match="promoted already"):
            manager.set_canary("a", "2", 0.5)
        with pytest.raises(InvalidRequestError, match="from 0 to 1"):
            manager.set_canary("a", "1", 1.5)
        canary = manager.set_canary("a", "1", 0.5).canary
        assert canary is not None
        assert (canary.number, canary.share) == (1, 0.5)

        assert manager.promote("a", "1").canary is None


def test_old_versions_go_and_leave_nothing_but_those_that_matter_stay(tmp_path: Path) -> None:
    retention = Retention(max_versions=3)
    with versions_of_a(tmp_path, 2, retention=retention, units=8, host_units=8) as (manager, _):
        held = lease(manager, "a@1")
        manager.pin("a@2", True)
        for seed in range(2, 7):
            write_version(tmp_path, "a", seed)
            manager.load("a").result(WAIT_S)
        assert [version.number for version in manager.get("a").versions] == [1, 2, 6, 7]
        manager.release(held)
        write_version(tmp_path, "a", 7)
        manager.load("a").result(WAIT_S)
        quiesce(manager)

        assert [version.number for version in manager.get("a").versions] == [2, 7, 8]
        assert manager.stats().pool_bytes_used + manager.stats().host_bytes_used == 3 * UNIT_BYTES


def test_versions_that_nobody_used_for_long_go(tmp_path: Path) -> None:
    with versions_of_a(tmp_path, 4, retention=Retention(max_age_s=-1.0)) as (manager, _):
        assert [version.number for version in manager.get("a").versions] == [3, 4]


def test_a_pin_of_a_name_goes_where_the_name_goes_and_one_of_a_version_stays(tmp_path: Path) -> None:
    write_version(tmp_path, "a", 0)
    write_units(tmp_path, ["b"])
    with managing(tmp_path, units=2) as manager:
        manager.load("a", pin=True).result(WAIT_S)
        write_version(tmp_path, "a", 1)
        manager.load("a").result(WAIT_S)
        use(manager, "b")
        quiesce(manager)
        states = {version.number: version.state for version in manager.get("a").versions}
        assert states == {1: AdapterState.HOST, 2: AdapterState.RESIDENT}
        manager.roll_back("a")
        quiesce(manager)
        assert manager.get("a").state is AdapterState.RESIDENT

        manager.pin("a", False)
        manager.pin("a@2", True)
        quiesce(manager)
        assert [version.pinned for version in manager.get("a").versions] == [False, True]


def test_one_version_can_be_unloaded_but_not_the_promoted_one(tmp_path: Path) -> None:
    with versions_of_a(tmp_path) as (manager, digests):
        with pytest.raises(InvalidRequestError, match="promote another one first"):
            manager.unload("a@2")
        held = lease(manager, "a@1")
        with pytest.raises(AdapterBusyError):
            manager.unload("a@1")
        manager.release(held)

        assert manager.unload("a@1").digest == digests[0]
        assert [version.number for version in manager.get("a").versions] == [2]
        assert manager.stats().pool_bytes_used == UNIT_BYTES
        with pytest.raises(InvalidRequestError, match="no earlier version"):
            manager.roll_back("a")


def test_a_canary_that_is_unloaded_gets_no_requests(tmp_path: Path) -> None:
    """Nor is it what the source has, or what a rollback returns to."""
    with versions_of_a(tmp_path, state_dir=tmp_path.parent / f"{tmp_path.name}-state") as (manager, digests):
        manager.roll_back("a")
        manager.set_canary("a", "2", 1.0)
        assert use(manager, "a").digest == digests[1]
        manager.unload("a@2")
        info = manager.get("a")

        assert (info.version, info.canary, info.previous) == (1, None, 0)
        assert use(manager, "a").digest == digests[0]
        with pytest.raises(AdapterVersionNotFoundError):
            manager.promote("a")
        manager.flush()


@pytest.mark.parametrize("version", ["main", "-1", "0x3", "3@4", "sha256:12", ""])
def test_what_is_no_version_is_neither_promoted_nor_a_canary(tmp_path: Path, version: str) -> None:
    with versions_of_a(tmp_path) as (manager, _):
        with pytest.raises(InvalidRequestError):
            manager.set_canary("a", version, 0.5)
        if version:
            with pytest.raises(InvalidRequestError):
                manager.promote("a", version)
        assert manager.get("a").version == 2


def test_content_that_comes_back_is_the_version_that_it_was(tmp_path: Path) -> None:
    with versions_of_a(tmp_path) as (manager, digests):
        write_version(tmp_path, "a", 0)

        assert manager.load("a").result(WAIT_S).version == 1
        assert use(manager, "a").digest == digests[0]


def test_a_version_whose_files_are_broken_changes_nothing(tmp_path: Path) -> None:
    with versions_of_a(tmp_path) as (manager, digests):
        edit_config(tmp_path / "a", gralora_k=3)
        with pytest.raises(AdapterRejectedError):
            manager.load("a").result(WAIT_S)

        assert use(manager, "a").digest == digests[1]
        assert "gralora_k: 3 does not divide" in manager.get("a").error
        write_version(tmp_path, "a", 5)
        assert manager.load("a").result(WAIT_S).error == ""


# What the soak of `benchmarks.catalogue` found.


def test_a_number_never_means_two_contents(tmp_path: Path) -> None:
    with versions_of_a(tmp_path) as (manager, _):
        manager.roll_back("a")
        manager.unload("a@2")
        write_version(tmp_path, "a", 5)

        assert manager.load("a").result(WAIT_S).version == 3
        with pytest.raises(AdapterVersionNotFoundError):
            lease(manager, "a@2")


def test_loading_what_is_promoted_already_forgets_no_rollback(tmp_path: Path) -> None:
    with versions_of_a(tmp_path) as (manager, _):
        manager.roll_back("a")
        write_version(tmp_path, "a", 0)
        loaded = manager.load("a").result(WAIT_S)

        assert (loaded.version, loaded.previous) == (1, 2)
        assert manager.roll_back("a").version == 2


def test_a_request_undoes_no_promotion(tmp_path: Path) -> None:
    """The promoted version's files are gone: it is lost, and the name stands for it all the same."""
    write_units(tmp_path, ["y"])
    write_version(tmp_path / ".kept", "3", 3)
    with versions_of_a(tmp_path, slots=1, host_units=0) as (manager, _):
        assert manager.load("a", Path(".kept/3")).result(WAIT_S).version == 3
        manager.promote("a", "1")
        use(manager, "y")
        with pytest.raises(AdapterVersionLostError):
            use(manager, "a")

        assert manager.get("a").version == 1


def test_a_request_brings_no_version_back_that_was_unloaded(tmp_path: Path) -> None:
    """What lies in the directory is what an operator rolled back from and removed."""
    write_units(tmp_path, ["y"])
    with versions_of_a(tmp_path, slots=1, host_units=0) as (manager, digests):
        manager.roll_back("a")
        manager.unload("a@2")
        use(manager, "y")
        with pytest.raises(AdapterVersionLostError):
            use(manager, "a")
        assert manager.get("a").version == 1

        assert manager.load("a").result(WAIT_S).digest == digests[1]  # an operator may
        assert manager.get("a").version == 3


def test_a_bug_met_while_taking_note_leaves_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_units(tmp_path, ["y"])
    with versions_of_a(tmp_path, 1, slots=1, host_units=0) as (manager, _):
        write_version(tmp_path, "a", 7)
        use(manager, "y")
        with monkeypatch.context() as patch:
            patch.setattr(manager._catalogue, "take_note", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                use(manager, "a")
        assert "taking in adapter 'a' failed" in caplog.text

        assert use(manager, "a").version == 2


def test_a_late_event_undoes_no_load_from_elsewhere(tmp_path: Path) -> None:
    write_version(tmp_path / ".kept", "3", 3)
    with versions_of_a(tmp_path) as (manager, _):
        assert manager.load("a", Path(".kept/3")).result(WAIT_S).version == 3
        manager.refresh("a")
        quiesce(manager)
        assert manager.get("a").version == 3
        write_version(tmp_path, "a", 4)  # a change that is one
        manager.refresh("a")

        until(lambda: manager.get("a").version == 4)


# Names that nobody registered.


def test_a_directory_that_is_copied_in_just_works(tmp_path: Path) -> None:
    with managing(tmp_path) as manager:
        with pytest.raises(AdapterNotFoundError):
            lease(manager, "other")
        write_units(tmp_path, ["a"])
        write_units(tmp_path / "acme", ["b"])

        assert [use(manager, name).name for name in ("a", "acme/b")] == ["a", "acme/b"]


def test_many_requests_for_an_unknown_name_look_once_and_read_once(tmp_path: Path, gate: Gate) -> None:
    class Counting(DirectorySource):
        found: ClassVar[list[str]] = []

        def find(self, name: str) -> Any:
            self.found.append(name)
            return super().find(name)

    with managing(None, sources=[Counting(tmp_path)]) as manager:
        write_units(tmp_path, ["a"])
        gate.shut()
        wanted = [manager.acquire("a") for _ in range(50)]
        gate.open()
        leases = [future.result(WAIT_S) for future in wanted]

        assert len(set(Counting.found)) == 1
        assert len(Counting.found) < 50  # those who come while it is looked up share the answer
        assert gate.names == ["a"]
        assert len({held.slot for held in leases}) == 1
        for held in leases:
            manager.release(held)


def test_a_name_that_was_unloaded_comes_back_by_a_load_only(tmp_path: Path) -> None:
    write_units(tmp_path, ["a"])
    with managing(tmp_path, watch="auto") as manager:
        use(manager, "a")
        manager.unload("a")
        write_version(tmp_path, "a", 3)
        manager.refresh("a")
        quiesce(manager)
        with pytest.raises(AdapterNotFoundError):
            lease(manager, "a")

        assert manager.load("a").result(WAIT_S).version == 2  # the first one's number means that one for ever
        assert use(manager, "a").name == "a"


def test_a_message_says_what_may_have_been_meant(tmp_path: Path) -> None:
    write_units(tmp_path, ["pirate", "bard"])
    with managing(tmp_path) as manager:
        with pytest.raises(AdapterNotFoundError, match="did you mean 'pirate'"):
            lease(manager, "pirat")
        with pytest.raises(AdapterNotFoundError) as caught:
            lease(manager, "zzz")
        assert "mean" not in str(caught.value)


# Watched directories.


def test_a_watched_directory_is_followed(tmp_path: Path) -> None:
    write_version(tmp_path, "a", 0)
    with managing(tmp_path, watch="auto", units=4) as manager:
        assert manager._discovery._watcher is not None
        assert manager._discovery._watcher.watching.wait(WAIT_S)
        old = use(manager, "a")
        write_version(tmp_path, "a", 1)
        until(lambda: manager.get("a").version == 2)
        assert use(manager, "a").digest == digest_of(tmp_path / "a") != old.digest

        write_units(tmp_path / "acme", ["b"])
        until(lambda: "acme/b" in {info.name for info in manager.list()})
        until(lambda: manager.get("acme/b").summary is not None)


def test_an_organisation_that_appears_as_a_whole_is_looked_into(tmp_path: Path) -> None:
    """The system tells of the new directory, and of nothing that was in it."""
    fresh = tmp_path.parent / f"{tmp_path.name}-acme"
    write_units(fresh, ["b", "c"])
    with managing(tmp_path, watch="auto", units=4) as manager:
        assert manager._discovery._watcher is not None
        assert manager._discovery._watcher.watching.wait(WAIT_S)
        (tmp_path / "soon").mkdir()
        fresh.rename(tmp_path / "acme")

        until(lambda: [info.name for info in manager.list()] == ["acme/b", "acme/c"])


def test_half_a_copy_replaces_nothing_and_the_whole_one_does(tmp_path: Path) -> None:
    write_version(tmp_path, "a", 0)
    with managing(tmp_path, watch="auto", units=4) as manager:
        assert manager._discovery._watcher is not None
        assert manager._discovery._watcher.watching.wait(WAIT_S)
        old = use(manager, "a")
        fresh = write_gralora(tmp_path.parent / f"{tmp_path.name}-fresh", r=8, seed=7)
        shutil.copy(fresh / CONFIG_FILE, tmp_path / "a" / CONFIG_FILE)  # of rank 8, for weights of rank 4
        until(lambda: manager.get("a").error != "")
        assert use(manager, "a").digest == old.digest
        for file in fresh.iterdir():
            shutil.copy(file, tmp_path / "a")

        until(lambda: manager.get("a").version == 2)
        assert use(manager, "a").digest == digest_of(fresh)
        assert manager.get("a").error == ""


def test_a_header_that_was_broken_at_start_and_is_mended_is_looked_at_again(tmp_path: Path) -> None:
    edit_config(write_version(tmp_path, "a", 0), gralora_k=3)
    with managing(tmp_path, watch="auto") as manager:
        assert manager._discovery._watcher is not None
        assert manager._discovery._watcher.watching.wait(WAIT_S)
        assert manager.get("a").state is AdapterState.FAILED
        write_version(tmp_path, "a", 0)

        until(lambda: manager.get("a").state is AdapterState.REGISTERED)
        until(lambda: manager.get("a").summary is not None)


# Lists.


def test_a_list_comes_in_pages_that_miss_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    names = [f"team-{i:02}" for i in range(25)]
    write_units(tmp_path, [*names, "zebra"])
    with managing(tmp_path) as manager:
        found, after = [], ""
        while True:
            page = manager.page(size=10, after=after, prefix="team-")
            found += [info.name for info in page.adapters]
            assert page.total == 25
            if not (after := page.next_after):
                break
        use(manager, "zebra")

        assert found == names
        assert {info.versions for info in manager.list()} == {()}  # lists leave them out
        resident = manager.page(size=10, states={AdapterState.RESIDENT})
        assert [info.name for info in resident.adapters] == ["zebra"]
        assert resident.next_after == ""


# Sources that give a directory away again.


class Elsewhere(DirectorySource):
    """Like a source on another machine: a download that made room for others is there again when it is asked for."""

    def __init__(self, path: Path, original: Path) -> None:
        super().__init__(path)
        self._original = original

    def find(self, name: str) -> Any:
        if not (self.root / name).exists() and (self._original / name).exists():
            shutil.copytree(self._original / name, self.root / name)
        return super().find(name)


def test_a_download_that_made_room_is_fetched_again(tmp_path: Path) -> None:
    downloads, original = tmp_path / "downloads", tmp_path / "original"
    downloads.mkdir()
    write_units(original, ["a", "b"])
    with managing(None, sources=[Elsewhere(downloads, original)], units=1, host_units=0) as manager:
        first = use(manager, "a")
        use(manager, "b")
        shutil.rmtree(downloads / "a")

        assert (use(manager, "a").digest, manager.get("a").version) == (first.digest, 1)
        use(manager, "b")
        shutil.rmtree(downloads / "a")
        shutil.rmtree(original / "a")
        time.sleep(ABSENT_S)
        with pytest.raises(AdapterVersionLostError, match="its files are gone"):
            use(manager, "a")
