"""The folder of what clients send: whole and checked or not there, whoever sends what and whenever the server dies."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.uploading import CONFIG, WEIGHTS, contents, manifest_of, send

from gralora_runtime.adapters.catalogue.manifest import Manifest, UploadFile
from gralora_runtime.adapters.catalogue.uploads import KEPT, OVERHEAD_BYTES, UNFINISHED, Share, UploadLimits, Uploads
from gralora_runtime.errors import (
    AdapterUploadError,
    AdapterUploadQuotaError,
    ConfigError,
    DrainingError,
    GraloraError,
    InvalidRequestError,
)

LIMITS = UploadLimits(adapter_bytes=100_000, total_bytes=2_000_000)
FILES = contents(0)
MANIFEST = manifest_of("acme/pirate", FILES)
SENDER = Path(__file__).parent.parent / "support" / "upload_sender.py"
NUM_KILLS = 20


def nobody_reads(folder: Path) -> bool:
    return False


@contextmanager
def opening(
    folder: Path,
    limits: UploadLimits = LIMITS,
    in_use: Callable[[Path], bool] = nobody_reads,
    now_s: Callable[[], float] | None = None,
) -> Iterator[Uploads]:
    clock = {} if now_s is None else {"now_s": now_s}
    uploads = Uploads(folder, limits=limits, in_use=in_use, **clock)
    try:
        yield uploads
    finally:
        uploads.close()


def receive(uploads: Uploads, manifest: Manifest, files: dict[str, bytes]) -> Path:
    """All that the server lacks, in one call."""
    upload = uploads.begin(manifest)
    try:
        send(upload, files, uploads.received(manifest))
        return upload.finish()
    finally:
        upload.close()


def push(uploads: Uploads, name: str, seed: int) -> Path:
    """A whole upload that could be loaded."""
    files = contents(seed)
    manifest = manifest_of(name, files)
    directory = receive(uploads, manifest, files)
    uploads.accept(manifest)
    return directory


def holds(directory: Path, files: dict[str, bytes]) -> bool:
    return all((directory / file).read_bytes() == data for file, data in files.items())


def share(max_bytes: int, owner: str = "acme/") -> Share:
    def refusal(taken_bytes: int, wanted_bytes: int) -> GraloraError:
        return GraloraError(f"{taken_bytes} are taken, {wanted_bytes} are wanted")

    return Share(is_own=lambda name: name.startswith(owner), max_bytes=max_bytes, refusal=refusal)


def left_in(folder: Path) -> set[str]:
    """Everything but the lock and the folders that are always there."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} - {".lock", UNFINISHED}


# --- one upload


def test_an_upload_that_was_cut_off_on_the_disk_can_be_sent_again(tmp_path: Path) -> None:
    with opening(tmp_path) as uploads:
        directory = push(uploads, MANIFEST.name, 0)
        os.truncate(directory / WEIGHTS, 3)

        assert uploads.received(MANIFEST) == dict.fromkeys(FILES, 0)
        assert receive(uploads, MANIFEST, FILES) == directory
        assert holds(directory, FILES)


def test_an_upload_is_found_when_it_was_accepted_and_not_before(tmp_path: Path) -> None:
    with opening(tmp_path) as uploads:
        assert uploads.received(MANIFEST) == {CONFIG: 0, WEIGHTS: 0}
        directory = receive(uploads, MANIFEST, FILES)
        before = uploads.find("acme/pirate")
        located = uploads.locate(directory)
        uploads.accept(MANIFEST)
        found = uploads.find("acme/pirate")

    assert before is None
    assert located == found
    assert (found.directory, found.roots, found.revision) == (directory, (directory,), MANIFEST.digest)
    assert holds(directory, FILES)
    assert directory.is_relative_to(tmp_path)


def test_files_may_come_in_any_order_and_pieces_over_each_other(tmp_path: Path) -> None:
    data = FILES[WEIGHTS]
    with opening(tmp_path) as uploads:
        upload = uploads.begin(MANIFEST)
        upload.write(WEIGHTS, 0, b"x" * 2000)
        upload.write(CONFIG, 0, FILES[CONFIG])
        upload.write(WEIGHTS, 0, data[:1500])
        upload.write(WEIGHTS, 1000, data[1000:2500])
        assert uploads.received(MANIFEST)[WEIGHTS] == 2500
        upload.write(WEIGHTS, 2400, data[2400:])
        directory = upload.finish()

    assert holds(directory, FILES)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 200)), max_size=12))
def test_what_is_here_is_always_a_beginning(writes: list[tuple[int, int]]) -> None:
    """Whatever offsets a client makes up: a piece is taken if it leaves no gap and ends in the file."""
    data = FILES[WEIGHTS][:400]
    files = {CONFIG: FILES[CONFIG], WEIGHTS: data}
    manifest = manifest_of("a", files)
    with tempfile.TemporaryDirectory() as folder, opening(Path(folder)) as uploads:
        upload, expected = uploads.begin(manifest), 0
        for offset, length in writes:
            piece = (data + data)[offset : offset + length]
            if offset <= expected and offset + length <= len(data):
                upload.write(WEIGHTS, offset, piece)
                expected = max(expected, offset + length)
            else:
                with pytest.raises(AdapterUploadError):
                    upload.write(WEIGHTS, offset, piece)
            assert uploads.received(manifest)[WEIGHTS] == expected
        upload.close()
        assert holds(receive(uploads, manifest, files), files)


@pytest.mark.parametrize(
    ("offset", "data", "problem"),
    [
        (1, b"x", "goes on at byte 1 of adapter_model.safetensors, of which 0 bytes are here"),
        (-1, b"x", "goes on at byte -1"),
        (0, b"x" * 3001, "sends more than the 3000 bytes of adapter_model.safetensors that it announced"),
        (1 << 62, b"x", "goes on at byte 4611686018427387904"),
    ],
)
def test_a_piece_that_does_not_fit_is_refused(offset: int, data: bytes, problem: str, tmp_path: Path) -> None:
    with opening(tmp_path) as uploads:
        with pytest.raises(AdapterUploadError, match=problem):
            uploads.begin(MANIFEST).write(WEIGHTS, offset, data)

        assert uploads.received(MANIFEST)[WEIGHTS] == 0


def test_a_piece_of_no_file_of_the_header_is_refused(tmp_path: Path) -> None:
    with opening(tmp_path) as uploads, pytest.raises(InvalidRequestError, match=r"chunk\.file"):
        uploads.begin(MANIFEST).write("golden.json", 0, b"x")


def test_a_file_with_another_hash_is_refused_and_can_be_sent_again(tmp_path: Path) -> None:
    wrong = {CONFIG: FILES[CONFIG], WEIGHTS: FILES[WEIGHTS][::-1]}
    with opening(tmp_path) as uploads:
        with pytest.raises(AdapterUploadError, match=r"has a wrong adapter_model\.safetensors: its SHA-256 is"):
            receive(uploads, MANIFEST, wrong)
        assert uploads.find("acme/pirate") is None
        assert uploads.received(MANIFEST) == {CONFIG: len(FILES[CONFIG]), WEIGHTS: 0}

        assert holds(receive(uploads, MANIFEST, FILES), FILES)


def test_what_is_not_complete_is_refused_and_goes_on_later(tmp_path: Path) -> None:
    with opening(tmp_path) as uploads:
        upload = uploads.begin(MANIFEST)
        upload.write(CONFIG, 0, FILES[CONFIG])
        upload.write(WEIGHTS, 0, FILES[WEIGHTS][:1234])
        with pytest.raises(AdapterUploadError, match="1234 of 3000 bytes"):
            upload.finish()
        upload.close()
        assert uploads.received(MANIFEST) == {CONFIG: len(FILES[CONFIG]), WEIGHTS: 1234}

        assert holds(receive(uploads, MANIFEST, FILES), FILES)


def test_an_empty_file_needs_no_piece(tmp_path: Path) -> None:
    files = FILES | {"README.md": b""}
    with opening(tmp_path) as uploads:
        directory = receive(uploads, manifest_of("a", files), files)

    assert (directory / "README.md").read_bytes() == b""


def test_the_same_again_needs_no_bytes(tmp_path: Path) -> None:
    with opening(tmp_path) as uploads:
        first = push(uploads, "a", 1)
        manifest = manifest_of("a", contents(1))
        assert uploads.received(manifest) == {file: len(data) for file, data in contents(1).items()}
        upload = uploads.begin(manifest)
        upload.write(WEIGHTS, 0, b"anything")

        assert upload.finish() == first
        assert holds(first, contents(1))


# --- names


HOSTILE = ["", "..", "../a", "/etc", "a/../b", "a/b/c", "a\0b", "a b", "-a", "a/", ".a", "a" * 129, "a@3", "ä", "a\n"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_none_makes_no_manifest(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"header\.name"):
        manifest_of(name, FILES)


@pytest.mark.parametrize(
    "file", ["", "../golden.json", "adapter_model.bin", "Golden.json", "manifest.json", "a/README.md"]
)
def test_a_file_that_no_adapter_has_makes_no_manifest(file: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"header\.files\[2\]\.name"):
        manifest_of("a", FILES | {file: b"x"})


@pytest.mark.parametrize(
    "changes", [{"size": -1}, {"sha256": "A" * 64}, {"sha256": "a" * 63}, {"sha256": "a" * 64 + "\n"}]
)
def test_a_file_that_cannot_be_makes_no_manifest(changes: dict[str, object]) -> None:
    file = UploadFile(name=CONFIG, size=1, sha256="a" * 64)
    with pytest.raises(InvalidRequestError, match=rf"header\.files\[0\]\.{next(iter(changes))}"):
        Manifest(name="a", files=(replace(file, **changes),))


def test_a_manifest_has_files_and_each_once() -> None:
    file = UploadFile(name=CONFIG, size=1, sha256="a" * 64)
    with pytest.raises(InvalidRequestError, match="is there twice"):
        Manifest(name="a", files=(file, file))
    with pytest.raises(InvalidRequestError, match="must not be empty"):
        Manifest(name="a", files=())


def test_names_that_look_alike_share_no_folder(tmp_path: Path) -> None:
    names = [
        "a",
        "A",
        "a.b",
        "a/b",
        "a@b",
        "a--b",
        "models--a",
        UNFINISHED,
        "x" * 128 + "/" + "y" * 128 + "@" + "z" * 128,
    ]
    with opening(tmp_path) as uploads:
        directories = {name: push(uploads, name, seed) for seed, name in enumerate(names)}
        for seed, name in enumerate(names):
            assert holds(uploads.find(name).directory, contents(seed))
        assert sorted(uploads.names()) == sorted(names)

    assert len({directory.parent for directory in directories.values()}) == len(names)
    assert all(directory.parent.parent == tmp_path for directory in directories.values())


def test_only_whole_uploads_are_located(tmp_path: Path) -> None:
    with opening(tmp_path) as uploads:
        directory = push(uploads, "a", 1)
        uploads.begin(manifest_of("b", contents(2)))
        unfinished = next((tmp_path / UNFINISHED).iterdir())
        elsewhere = [unfinished, tmp_path, directory.parent, directory / CONFIG, Path("a"), Path(directory.name)]
        elsewhere += [directory / "..", directory.parent / ".." / directory.parent.name / directory.name]

        assert uploads.locate(directory) is not None
        assert [path for path in elsewhere if uploads.locate(path) is not None] == []


# --- several uploads of a name


def test_the_newest_accepted_one_is_found_and_eight_are_kept(tmp_path: Path) -> None:
    with opening(tmp_path) as uploads:
        directories = [push(uploads, "a", seed) for seed in range(KEPT + 3)]
        assert uploads.find("a").directory == directories[-1]
        assert [directory.is_dir() for directory in directories] == [False] * 3 + [True] * KEPT
        push(uploads, "a", 5)
        assert uploads.find("a").directory == directories[5]

    with opening(tmp_path) as uploads:
        assert uploads.find("a").directory == directories[5]


def test_what_the_catalogue_still_reads_is_kept_beyond_that(tmp_path: Path) -> None:
    used: set[Path] = set()
    with opening(tmp_path, in_use=used.__contains__) as uploads:
        first = push(uploads, "a", 0)
        used.add(first)
        second = push(uploads, "a", 1)
        for seed in range(2, KEPT + 4):
            push(uploads, "a", seed)
        assert (first.is_dir(), second.is_dir()) == (True, False)
        used.clear()
        push(uploads, "a", 99)

        assert not first.is_dir()


def test_a_rejected_upload_leaves_nothing(tmp_path: Path) -> None:
    with opening(tmp_path) as uploads:
        receive(uploads, MANIFEST, FILES)
        uploads.reject(MANIFEST)

        assert left_in(tmp_path) == set()
        assert uploads.received(MANIFEST) == {CONFIG: 0, WEIGHTS: 0}


def test_rejecting_what_was_accepted_once_takes_nothing_away(tmp_path: Path) -> None:
    """It may have been refused for want of room."""
    with opening(tmp_path) as uploads:
        directory = push(uploads, "a", 1)
        uploads.reject(manifest_of("a", contents(1)))
        uploads.set_back(manifest_of("a", contents(1)))

        assert uploads.find("a").directory == directory
        assert holds(directory, contents(1))


def test_an_upload_that_is_set_back_needs_no_bytes_again(tmp_path: Path) -> None:
    with opening(tmp_path) as uploads:
        receive(uploads, MANIFEST, FILES)
        uploads.set_back(MANIFEST)
        assert uploads.received(MANIFEST) == {file: len(data) for file, data in FILES.items()}
        upload = uploads.begin(MANIFEST)

        assert holds(upload.finish(), FILES)


def test_a_newer_call_takes_the_name_over(tmp_path: Path) -> None:
    """Its client lost a connection that the server believes in."""
    with opening(tmp_path) as uploads:
        old = uploads.begin(MANIFEST)
        old.write(WEIGHTS, 0, FILES[WEIGHTS][:1000])
        new = uploads.begin(MANIFEST)
        with pytest.raises(AdapterUploadError, match="gave way to a newer one"):
            old.write(WEIGHTS, 1000, b"x")
        with pytest.raises(AdapterUploadError, match="gave way to a newer one"):
            old.finish()
        old.close()
        send(new, FILES, uploads.received(MANIFEST))

        assert holds(new.finish(), FILES)


# --- limits


def test_an_adapter_has_a_largest_size(tmp_path: Path) -> None:
    size = MANIFEST.num_bytes
    with opening(tmp_path, replace(LIMITS, adapter_bytes=size - 1)) as uploads:
        with pytest.raises(AdapterUploadQuotaError, match=f"it has {size} bytes of at most {size - 1}"):
            uploads.begin(MANIFEST)
        assert left_in(tmp_path) == set()
    with opening(tmp_path, replace(LIMITS, adapter_bytes=size)) as uploads:
        receive(uploads, MANIFEST, FILES)


def test_all_uploads_together_have_one_and_unfinished_ones_count_whole(tmp_path: Path) -> None:
    each = manifest_of("x", contents(1)).num_bytes + OVERHEAD_BYTES
    limits = replace(LIMITS, total_bytes=2 * each)
    with opening(tmp_path, limits) as uploads:
        push(uploads, "a", 1)
        uploads.begin(manifest_of("b", contents(2))).close()
        with pytest.raises(AdapterUploadQuotaError, match="0 are left"):
            uploads.begin(manifest_of("c", contents(3)))
        uploads.begin(manifest_of("b", contents(2))).close()  # it has its room
    with opening(tmp_path, limits) as uploads:
        with pytest.raises(AdapterUploadQuotaError, match="0 are left"):
            uploads.begin(manifest_of("c", contents(3)))
        receive(uploads, manifest_of("b", contents(2)), contents(2))
        uploads.reject(manifest_of("b", contents(2)))
        push(uploads, "c", 3)


def test_few_are_sent_at_once(tmp_path: Path) -> None:
    with opening(tmp_path, replace(LIMITS, at_once=2)) as uploads:
        first = uploads.begin(manifest_of("a", FILES))
        uploads.begin(manifest_of("b", FILES))
        with pytest.raises(AdapterUploadQuotaError, match="2 uploads are being sent already") as caught:
            uploads.begin(manifest_of("c", FILES))
        uploads.begin(manifest_of("b", FILES))  # takes its own place over
        first.close()
        uploads.begin(manifest_of("c", FILES))

    assert caught.value.retry_after_s


def test_a_full_disk_is_a_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opening(tmp_path) as uploads:
        upload = uploads.begin(MANIFEST)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "touch", full)
            with pytest.raises(AdapterUploadQuotaError, match="the disk is full"):
                upload.write(WEIGHTS, 0, b"x")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        with pytest.raises(AdapterUploadQuotaError, match="the disk has no"):
            uploads.begin(manifest_of("b", FILES))


@pytest.mark.parametrize(
    ("number", "kind", "problem"),
    [(errno.ENOSPC, AdapterUploadQuotaError, "the disk is full"), (errno.EROFS, AdapterUploadError, "Read-only")],
)
def test_what_the_disk_refuses_at_any_step_is_told_leaves_nothing_and_can_be_tried_again(
    number: int, kind: type[Exception], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with opening(tmp_path) as uploads:
        for step in (
            lambda: uploads.begin(MANIFEST).close(),
            lambda: receive(uploads, MANIFEST, FILES),
            lambda: uploads.accept(MANIFEST),
            lambda: uploads.delete(MANIFEST.name),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", refuse)
                with pytest.raises(kind, match=problem):
                    step()
            assert not list((tmp_path / UNFINISHED).glob("new-*")) + list((tmp_path / UNFINISHED).glob("record-*"))
            step()
        assert left_in(tmp_path) == set()


def test_what_nobody_goes_on_with_is_removed_after_a_while(tmp_path: Path) -> None:
    now_s = [1e10]
    limits = replace(LIMITS, unfinished_age_s=100.0)
    with opening(tmp_path, limits, now_s=lambda: now_s[0]) as uploads:
        left, sent = manifest_of("left", FILES), manifest_of("sent", FILES)
        uploads.begin(left).write(CONFIG, 0, FILES[CONFIG])
        old = uploads.begin(left)
        old.close()
        uploads.begin(sent).write(CONFIG, 0, FILES[CONFIG])
        now_s[0] += 99
        uploads.begin(manifest_of("other", FILES)).close()
        assert uploads.received(left)[CONFIG] == len(FILES[CONFIG])
        now_s[0] += 2
        uploads.begin(manifest_of("other", FILES)).close()

        assert uploads.received(left)[CONFIG] == 0
        assert uploads.received(sent)[CONFIG] == len(FILES[CONFIG])  # somebody is still there


# --- starts and ends


def test_a_restart_in_the_middle_goes_on(tmp_path: Path) -> None:
    with opening(tmp_path) as uploads:
        push(uploads, "old", 1)
        uploads.begin(MANIFEST).write(WEIGHTS, 0, FILES[WEIGHTS][:1700])
    with opening(tmp_path) as uploads:
        assert uploads.received(MANIFEST) == {CONFIG: 0, WEIGHTS: 1700}
        assert holds(receive(uploads, MANIFEST, FILES), FILES)
        assert list(uploads.names()) == ["old"]
        assert holds(uploads.find("old").directory, contents(1))


def test_a_restart_before_it_was_accepted_makes_it_unfinished_again(tmp_path: Path) -> None:
    """Nobody knows whether it can be loaded, so nobody is to find it."""
    with opening(tmp_path) as uploads:
        first = push(uploads, "a", 1)
        receive(uploads, manifest_of("a", contents(2)), contents(2))
        receive(uploads, MANIFEST, FILES)
    with opening(tmp_path) as uploads:
        assert uploads.find("a").directory == first
        assert list(uploads.names()) == ["a"]
        assert uploads.received(MANIFEST) == {file: len(data) for file, data in FILES.items()}
        upload = uploads.begin(manifest_of("a", contents(2)))

        assert holds(upload.finish(), contents(2))


def test_what_a_dead_server_left_in_between_is_removed(tmp_path: Path) -> None:
    with opening(tmp_path) as uploads:
        directory = push(uploads, "a", 1)
    unfinished = tmp_path / UNFINISHED
    for name in ("new-1", "removed-1", "f" * 64):
        shutil.copytree(directory, unfinished / name)
    (unfinished / "record-1").write_text("{")
    (unfinished / ("e" * 64)).mkdir()
    (tmp_path / ("0" * 64)).mkdir()
    with opening(tmp_path) as uploads:
        assert list(unfinished.iterdir()) == []
        assert not (tmp_path / ("0" * 64)).exists()
        assert uploads.find("a").directory == directory


def test_a_directory_that_somebody_removed_is_not_found(tmp_path: Path) -> None:
    with opening(tmp_path) as uploads:
        shutil.rmtree(push(uploads, "a", 1))
        assert uploads.find("a") is None
    with opening(tmp_path) as uploads:
        assert list(uploads.names()) == []


def test_two_servers_share_no_folder(tmp_path: Path) -> None:
    with opening(tmp_path), pytest.raises(ConfigError, match="another server keeps its uploads here"):
        Uploads(tmp_path, limits=LIMITS, in_use=nobody_reads)


def test_another_server_may_have_the_folder_when_any_thread_has_closed_it(tmp_path: Path) -> None:
    """A lock of one thread would stay taken."""
    uploads = Uploads(tmp_path, limits=LIMITS, in_use=nobody_reads)
    closing = threading.Thread(target=uploads.close)
    closing.start()
    closing.join()
    with opening(tmp_path):
        pass


def test_nothing_is_taken_after_the_end(tmp_path: Path) -> None:
    with opening(tmp_path) as uploads:
        receive(uploads, MANIFEST, FILES)
        sending = uploads.begin(manifest_of("b", FILES))
    for call in (
        lambda: sending.write(WEIGHTS, 0, b"x"),
        sending.finish,
        lambda: uploads.begin(MANIFEST),
        lambda: uploads.accept(MANIFEST),
    ):
        with pytest.raises(DrainingError):
            call()


def test_uploads_of_many_names_at_once_are_each_whole(tmp_path: Path) -> None:
    with opening(tmp_path, replace(LIMITS, at_once=8)) as uploads:
        threads = [threading.Thread(target=push, args=(uploads, f"n{seed}", seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert all(holds(uploads.find(f"n{seed}").directory, contents(seed)) for seed in range(8))


def test_a_server_that_is_killed_again_and_again_ends_with_every_upload_whole(tmp_path: Path) -> None:
    """A process sends and accepts one upload after the other, and is killed at a random point, twenty times."""
    rng = random.Random(7)
    seen: list[int] = []
    for _ in range(NUM_KILLS):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(
            [sys.executable, SENDER, tmp_path],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        ) as sender:
            for _ in range(rng.randrange(1, 60)):
                assert sender.stdout.readline()
            sender.kill()
        with opening(tmp_path) as uploads:
            names = sorted(uploads.names(), key=lambda name: int(name.removeprefix("n")))
            seen.append(len(names))
            for name in names:
                assert holds(uploads.find(name).directory, contents(int(name.removeprefix("n")), 20_000))
            left = [path for path in (tmp_path / UNFINISHED).iterdir() if not (path / "manifest.json").is_file()]
            assert left == []

    assert seen == sorted(seen)  # what was accepted once is never lost
    assert seen[-1] > 0
    with opening(tmp_path) as uploads:
        files = contents(seen[-1], 20_000)
        assert holds(receive(uploads, manifest_of(f"n{seen[-1]}", files), files), files)


# --- deleting


def test_deleting_leaves_nothing_of_a_name_and_gives_its_room_back(tmp_path: Path) -> None:
    size = sum(map(len, contents(0).values())) + OVERHEAD_BYTES
    limits = replace(LIMITS, total_bytes=3 * size)
    with opening(tmp_path, limits) as uploads:
        other = push(uploads, "b", 0)
        for seed in (1, 2):
            push(uploads, "a", seed)
        with pytest.raises(AdapterUploadQuotaError):
            push(uploads, "c", 3)
        uploads.delete("a")
        assert (uploads.has("a"), uploads.find("a"), list(uploads.names())) == (False, None, ["b"])
        assert {path.split("/")[0] for path in left_in(tmp_path)} == {other.parent.name}
        again = [push(uploads, "a", seed) for seed in (1, 3)]
        assert uploads.find("a").directory == again[-1]

    with opening(tmp_path, limits) as uploads:
        assert sorted(uploads.names()) == ["a", "b"]


def test_deleting_ends_what_is_being_sent_and_takes_what_broke_off(tmp_path: Path) -> None:
    with opening(tmp_path) as uploads:
        push(uploads, "a", 1)
        broken_off = uploads.begin(manifest_of("a", contents(2)))
        broken_off.close()
        same = uploads.begin(manifest_of("a", contents(1)))
        others = uploads.begin(manifest_of("b", contents(1)))
        uploads.delete("a")
        with pytest.raises(AdapterUploadError, match="was deleted"):
            same.write(CONFIG, 0, b"{")
        same.close()
        others.write(CONFIG, 0, b"{")

        assert left_in(tmp_path) == {
            f"{UNFINISHED}/{uploads._staging(others.manifest).name}",
            *(f"{UNFINISHED}/{uploads._staging(others.manifest).name}/{file}" for file in (CONFIG, "manifest.json")),
        }
        others.close()


def test_what_the_catalogue_reads_is_not_deleted(tmp_path: Path) -> None:
    used: set[Path] = set()
    with opening(tmp_path, in_use=used.__contains__) as uploads:
        directories = [push(uploads, "a", seed) for seed in (1, 2)]
        used.add(directories[0])
        with pytest.raises(AdapterUploadError, match="is read from it"):
            uploads.delete("a")

        assert uploads.find("a").directory == directories[1]
        assert all(directory.is_dir() for directory in directories)


def test_deleting_follows_no_link_out_of_the_folder(tmp_path: Path) -> None:
    """There is none unless somebody put one there; the files that it means are not ours."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / WEIGHTS).write_bytes(b"somebody's")
    with opening(tmp_path / "uploads") as uploads:
        directory = push(uploads, "a", 1)
        (directory / "nested").symlink_to(outside)
        (directory.parent / ("0" * 64)).symlink_to(outside)
        uploads.delete("a")

        assert (outside / WEIGHTS).read_bytes() == b"somebody's"
        assert not directory.exists()


@pytest.mark.parametrize("step", ["sync_directory", "shutil.rmtree"])
def test_a_kill_while_deleting_leaves_nothing_that_is_found(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        """Nobody catches it."""

    def killed(*_: object) -> None:
        raise KilledError

    with opening(tmp_path) as uploads:
        push(uploads, "a", 1)
        monkeypatch.setattr(f"gralora_runtime.adapters.catalogue.uploads.{step}", killed)
        with pytest.raises(KilledError):
            uploads.delete("a")
        monkeypatch.undo()

    with opening(tmp_path) as uploads:
        assert (uploads.find("a"), list(uploads.names())) == (None, [])
        assert holds(push(uploads, "a", 1), contents(1))


@pytest.mark.parametrize("is_restarted", [False, True], ids=["running", "restarted"])
def test_names_of_one_owner_have_only_their_share(is_restarted: bool, tmp_path: Path) -> None:
    """What is begun counts as what is kept, others' does not, and what is here already may always go on."""
    size = sum(map(len, FILES.values())) + OVERHEAD_BYTES
    begun = manifest_of("acme/begun", contents(1))
    with ExitStack() as stack:
        uploads = stack.enter_context(opening(tmp_path))
        push(uploads, "acme/kept", 0)
        push(uploads, "other/kept", 0)
        upload = uploads.begin(begun, share(2 * size))
        upload.write(WEIGHTS, 0, contents(1)[WEIGHTS][:1000])
        upload.close()
        if is_restarted:
            stack.pop_all().close()
            uploads = stack.enter_context(opening(tmp_path))

        with pytest.raises(GraloraError, match=f"{2 * size} are taken, {size} are wanted"):
            uploads.begin(manifest_of("acme/more", FILES), share(2 * size))
        uploads.begin(begun, share(1)).close()
        uploads.begin(manifest_of("acme/kept", FILES), share(1)).close()
        uploads.begin(manifest_of("other/more", FILES), share(2 * size, "other/")).close()
        uploads.delete("acme/kept")
        uploads.begin(manifest_of("acme/more", FILES), share(2 * size)).close()
