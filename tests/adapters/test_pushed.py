"""Uploads among a manager's sources: what comes first, and what a refused one does to the name that it has."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from adapters.harness import WAIT_S, lease, managing, quiesce, use, write_units
from support.checkpoints import edit_config
from support.uploading import manifest_of, send

from gralora_runtime.adapters.catalogue.sources.directory import DirectorySource
from gralora_runtime.adapters.catalogue.uploads import KEPT, UploadLimits, Uploads
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.residency import mover
from gralora_runtime.errors import AdapterCapacityError, AdapterNotFoundError, AdapterRejectedError, InvalidRequestError


@contextmanager
def with_uploads(root: Path, *, units: float = 4, **options: Any) -> Iterator[tuple[AdapterManager, Uploads]]:
    """A manager over `root/adapters`, with `root/uploads` before it."""
    (root / "adapters").mkdir(exist_ok=True)
    made: list[AdapterManager] = []
    uploads = Uploads(
        root / "uploads",
        limits=UploadLimits(),
        in_use=lambda folder: any(manager.has_version_at(folder) for manager in made),
    )
    sources = [uploads, DirectorySource(root / "adapters")]
    with managing(None, sources=sources, units=units, slots=16, **options) as manager:
        made.append(manager)
        yield manager, uploads


def upload(uploads: Uploads, name: str, trained: Path) -> Path:
    """All of it, but nobody has said yet that it can be loaded."""
    files = {file: (trained / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}
    manifest = manifest_of(name, files)
    call = uploads.begin(manifest)
    send(call, files, uploads.received(manifest), step=1 << 20)
    directory = call.finish()
    call.close()
    return directory


def accept(uploads: Uploads, name: str, trained: Path) -> None:
    uploads.accept(manifest_of(name, {file: (trained / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """`one` to `three`, each with weights of its own, `broken`, and `huge`, which fits no pool beside another."""
    write_units(tmp_path / "trained", ["one", "two", "three", "broken"])
    write_units(tmp_path / "trained", ["huge"], units=4)
    edit_config(tmp_path / "trained" / "broken", gralora_k=3)
    return tmp_path / "trained"


def test_an_upload_is_registered_by_its_load_and_by_that_alone(tmp_path: Path, trained: Path) -> None:
    with with_uploads(tmp_path) as (manager, uploads):
        directory = upload(uploads, "a", trained / "one")
        with pytest.raises(AdapterNotFoundError):
            lease(manager, "a")
        info = manager.load("a", directory).result(WAIT_S)

        assert (info.source, info.version) == (str(directory), 1)
        assert use(manager, "a").digest == info.digest
        assert manager.uploads is uploads


def test_a_refused_upload_registers_nothing(tmp_path: Path, trained: Path) -> None:
    with with_uploads(tmp_path) as (manager, uploads):
        directory = upload(uploads, "a", trained / "broken")
        with pytest.raises(AdapterRejectedError, match="gralora_k"):
            manager.load("a", directory).result(WAIT_S)

        assert manager.list() == ()
        assert not manager.has_version_at(directory)


@pytest.mark.parametrize("read", [True, False])
def test_a_refused_upload_leaves_a_name_what_it_was(read: bool, tmp_path: Path, trained: Path) -> None:
    """It used to point the name at the refused files if nobody had read it yet."""
    write_units(tmp_path / "adapters", ["a"])
    with with_uploads(tmp_path) as (manager, uploads):
        if read:
            use(manager, "a")
        before = manager.get("a")
        directory = upload(uploads, "a", trained / "broken")
        with pytest.raises(AdapterRejectedError, match="gralora_k"):
            manager.load("a", directory).result(WAIT_S)
        after = manager.get("a")

        assert (after.source, after.error, len(after.versions)) == (before.source, "", 1)
        assert use(manager, "a").version == 1


def test_an_upload_that_can_never_fit_is_no_version(tmp_path: Path, trained: Path) -> None:
    with with_uploads(tmp_path) as (manager, uploads):
        info = manager.load("a", upload(uploads, "a", trained / "one"), pin=True).result(WAIT_S)
        directory = upload(uploads, "a", trained / "huge")
        with pytest.raises(AdapterCapacityError):
            manager.load("a", directory).result(WAIT_S)

        assert not manager.has_version_at(directory)
        assert use(manager, "a").digest == info.digest


def test_an_upload_waits_until_a_name_that_is_being_read_is_known(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request gets what it was read from, the name becomes the upload, and neither is taken for the other."""
    write_units(tmp_path / "adapters", ["a"])
    begun, may_end, load = threading.Event(), threading.Event(), mover.load

    def slowly(name: str, source: Path, *arguments: Any, **options: Any) -> Any:
        if source.parent == tmp_path / "adapters":
            begun.set()
            assert may_end.wait(WAIT_S)
        return load(name, source, *arguments, **options)

    monkeypatch.setattr(mover, "load", slowly)
    with with_uploads(tmp_path) as (manager, uploads):
        old = manager.acquire("a")
        assert begun.wait(WAIT_S)
        directory = upload(uploads, "a", trained / "one")
        loading = manager.load("a", directory)
        manager._discovery._refresher.submit(int).result(WAIT_S)  # the upload has been read by now
        may_end.set()
        info = loading.result(WAIT_S)
        held = old.result(WAIT_S)
        manager.release(held)
        quiesce(manager)

        assert (info.version, info.source) == (2, str(directory))
        assert (held.version, held.digest) == (1, info.versions[0].digest)
        assert use(manager, "a").digest == info.digest != held.digest


def test_uploads_come_before_directories_at_start(tmp_path: Path, trained: Path) -> None:
    write_units(tmp_path / "adapters", ["a", "b"])
    with with_uploads(tmp_path) as (manager, uploads):
        info = manager.load("a", upload(uploads, "a", trained / "one")).result(WAIT_S)
        accept(uploads, "a", trained / "one")
    with with_uploads(tmp_path) as (manager, uploads):
        sources = {adapter.name: Path(adapter.source) for adapter in manager.list()}

        assert sources == {"a": uploads.find("a").directory, "b": tmp_path / "adapters" / "b"}
        assert use(manager, "a").digest == info.digest


def test_an_upload_that_a_killed_server_had_loaded_is_its_names(tmp_path: Path, trained: Path) -> None:
    """The name used to stand for files that had gone back to the unfinished ones."""
    with with_uploads(tmp_path, state_dir=tmp_path / "state") as (manager, uploads):
        first = manager.load("a", upload(uploads, "a", trained / "one")).result(WAIT_S)
        accept(uploads, "a", trained / "one")
        second = manager.load("a", upload(uploads, "a", trained / "two")).result(WAIT_S)
        other = upload(uploads, "a", trained / "three")
    with with_uploads(tmp_path, state_dir=tmp_path / "state") as (manager, uploads):
        assert uploads.find("a").directory == Path(second.source)
        assert [use(manager, name).digest for name in ("a", "a@1")] == [second.digest, first.digest]
        assert not other.exists()  # nobody had loaded it


def test_an_upload_that_is_sent_again_and_killed_before_the_answer_is_the_one_to_serve(
    tmp_path: Path, trained: Path
) -> None:
    """The catalogue said one, the uploads' record another, and the next load believed the record."""
    with with_uploads(tmp_path, state_dir=tmp_path / "state") as (manager, uploads):
        for sent in ("one", "two"):
            manager.load("a", upload(uploads, "a", trained / sent)).result(WAIT_S)
            accept(uploads, "a", trained / sent)
        manager.load("a", upload(uploads, "a", trained / "one")).result(WAIT_S)
    with with_uploads(tmp_path, state_dir=tmp_path / "state") as (manager, uploads):
        assert manager.get("a").version == 1
        assert manager.load("a").result(WAIT_S).version == 1


def test_an_upload_that_a_killed_server_accepted_comes_before_those_that_follow(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its catalogue had not heard of it, so it was read at start, and used to take the place of a later one."""
    may_answer, find = threading.Event(), Uploads.find

    def slowly(self: Uploads, name: str) -> Any:
        if threading.current_thread() is not threading.main_thread():
            assert may_answer.wait(WAIT_S)
        return find(self, name)

    write_units(tmp_path / "adapters", ["a"])
    with with_uploads(tmp_path, state_dir=tmp_path / "state") as (manager, uploads):
        use(manager, "a")
    with with_uploads(tmp_path) as (_, uploads):  # without that catalogue
        upload(uploads, "a", trained / "two")
        accept(uploads, "a", trained / "two")
    monkeypatch.setattr(Uploads, "find", slowly)
    with with_uploads(tmp_path, state_dir=tmp_path / "state") as (manager, uploads):
        info = manager.load("a", upload(uploads, "a", trained / "three")).result(WAIT_S)
        may_answer.set()
        quiesce(manager)

        assert [version.number for version in info.versions] == [1, 2, 3]
        assert manager.get("a").version == 3


def test_what_a_version_is_read_from_stays_while_there_is_that_version(tmp_path: Path, trained: Path) -> None:
    write_units(tmp_path / "later", [f"n{number}" for number in range(KEPT + 1)])
    with with_uploads(tmp_path) as (manager, uploads):
        first = upload(uploads, "a", trained / "one")
        manager.load("a", first).result(WAIT_S)
        accept(uploads, "a", trained / "one")
        manager.pin("a@1", True)
        for number in range(KEPT + 1):
            directory = upload(uploads, "a", tmp_path / "later" / f"n{number}")
            manager.load("a", directory).result(WAIT_S)
            accept(uploads, "a", tmp_path / "later" / f"n{number}")
        assert first.is_dir()
        assert use(manager, "a@1").version == 1
        manager.unload("a@1")
        accept(uploads, "a", tmp_path / "later" / f"n{KEPT}")  # the newest again: only the first is one too many

        assert not first.is_dir()
        assert manager.get("a").source == str(directory)


def test_an_operators_path_never_means_an_upload_by_accident(tmp_path: Path, trained: Path) -> None:
    write_units(tmp_path / "adapters", ["a"])
    with with_uploads(tmp_path) as (manager, uploads):
        upload(uploads, "b", trained / "one")
        assert manager.load("x", Path("a")).result(WAIT_S).source == str(tmp_path / "adapters" / "a")
        for path in (tmp_path / "uploads", tmp_path / "uploads" / "tmp", tmp_path / "trained" / "one"):
            with pytest.raises(InvalidRequestError, match="leaves the adapters directory"):
                manager.load("x", path)
