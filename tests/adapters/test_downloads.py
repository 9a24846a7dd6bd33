"""The folder of downloads: within its budget, whole or not at all, and never without what somebody uses."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gralora_runtime.adapters.catalogue.sources import fetch as fetching
from gralora_runtime.adapters.catalogue.sources.downloads import UNFINISHED, Downloads, Wanted
from gralora_runtime.adapters.catalogue.sources.fetch import Body, Checksum, CutError, Fetch, Limits, RemoteFile
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.errors import AdapterSourceError, ConfigError

WAIT_S = 20.0
LIMITS = Limits(pause_s=0.0)


def open_downloads(
    folder: Path,
    *,
    budget_bytes: int = 1000,
    in_use: Callable[[Path], bool] = lambda path: False,
    limits: Limits = LIMITS,
    grace_s: float = 0.0,
) -> Downloads:
    return Downloads(folder, budget_bytes=budget_bytes, in_use=in_use, limits=limits, grace_s=grace_s)


@contextmanager
def opening(folder: Path, **options: object) -> Iterator[Downloads]:
    downloads = open_downloads(folder, **options)
    try:
        yield downloads
    finally:
        downloads.close()


def remote(data: bytes, *, cuts: list[int] | None = None, asked: list[int] | None = None) -> fetching.OpenAt:
    """A remote that has these bytes, and breaks off after so many of them each time."""

    @contextmanager
    def open_at(start: int) -> Iterator[Body]:
        if asked is not None:
            asked.append(start)
        if cuts:
            yield Body(start=start, chunks=cut(data[start : start + cuts.pop(0)]))
        else:
            yield Body(start=start, chunks=iter([data[start:]]))

    def cut(piece: bytes) -> Iterator[bytes]:
        yield piece
        raise CutError("connection reset")

    return open_at


def wanted(downloads: Downloads, name: str, num_bytes: int) -> Wanted:
    return Wanted(directory=downloads.folder / "kind" / name, name=name, source="test://", num_bytes=num_bytes)


def get(downloads: Downloads, name: str, num_bytes: int = 100, data: bytes | None = None) -> Path:
    data = bytes(num_bytes) if data is None else data
    file = RemoteFile(name=CONFIG_FILE, num_bytes=num_bytes, checksum=None)
    asked = wanted(downloads, name, num_bytes)
    downloads.obtain(asked, lambda fetch: fetch.file(file, remote(data)) and None)
    return asked.directory


def test_a_directory_gets_its_name_when_all_of_it_is_there(tmp_path: Path) -> None:
    with opening(tmp_path) as downloads:
        asked = wanted(downloads, "a", 4)

        def fill(fetch: Fetch) -> None:
            fetch.file(RemoteFile(name=CONFIG_FILE, num_bytes=2, checksum=None), remote(b"{}"))
            assert not asked.directory.exists()
            fetch.file(RemoteFile(name="golden.json", num_bytes=2, checksum=None), remote(b"[]"))

        downloads.obtain(asked, fill)

        assert {path.name: path.read_bytes() for path in asked.directory.iterdir()} == {
            CONFIG_FILE: b"{}",
            "golden.json": b"[]",
        }
        assert list((tmp_path / UNFINISHED).iterdir()) == []


def test_what_was_used_least_recently_goes_first(tmp_path: Path) -> None:
    with opening(tmp_path, budget_bytes=300) as downloads:
        a, b, c = (get(downloads, name) for name in "abc")
        assert downloads.use(a)

        d = get(downloads, "d")

        assert [path.exists() for path in (a, b, c, d)] == [True, False, True, True]
        assert not downloads.use(b)


def test_the_order_of_use_outlives_the_process(tmp_path: Path) -> None:
    with opening(tmp_path, budget_bytes=300) as downloads:
        a, b, c = (get(downloads, name) for name in "abc")
        assert downloads.use(a)

    with opening(tmp_path, budget_bytes=300) as downloads:
        get(downloads, "d")

        assert [path.exists() for path in (a, b, c)] == [True, False, True]


def test_what_is_in_use_is_never_removed(tmp_path: Path) -> None:
    busy: set[Path] = set()
    with opening(tmp_path, budget_bytes=200, in_use=busy.__contains__) as downloads:
        a, b = get(downloads, "a"), get(downloads, "b")
        busy.update((a, b))

        with pytest.raises(AdapterSourceError, match="budget of 200 bytes has no room") as caught:
            get(downloads, "c")
        assert LIMITS.retry_after_s == caught.value.retry_after_s
        assert a.exists()
        assert b.exists()

        busy.remove(b)
        get(downloads, "c")
        assert a.exists()
        assert not b.exists()


def test_what_was_found_a_moment_ago_is_not_removed(tmp_path: Path) -> None:
    """Whoever was told of it has yet to open its files, so nobody holds it yet."""
    with opening(tmp_path, budget_bytes=100, grace_s=3600.0) as downloads:
        a = get(downloads, "a")

        with pytest.raises(AdapterSourceError, match="has no room"):
            get(downloads, "b")

        assert a.exists()


def test_what_can_never_fit_removes_nothing_else_of_use(tmp_path: Path) -> None:
    with opening(tmp_path, budget_bytes=200) as downloads:
        a = get(downloads, "a")

        with pytest.raises(AdapterSourceError, match="has 201 bytes to fetch"):
            get(downloads, "b", 201)

        assert a.exists()


def test_room_counts_what_is_still_being_fetched(tmp_path: Path) -> None:
    with opening(tmp_path, budget_bytes=150) as downloads:

        def fill(fetch: Fetch) -> None:
            with pytest.raises(AdapterSourceError, match="has no room"):
                get(downloads, "b")
            fetch.file(RemoteFile(name=CONFIG_FILE, num_bytes=100, checksum=None), remote(bytes(100)))

        downloads.obtain(wanted(downloads, "a", 100), fill)


def test_room_may_grow_while_it_is_fetched(tmp_path: Path) -> None:
    with opening(tmp_path, budget_bytes=150) as downloads:
        asked = wanted(downloads, "a", 100)

        def fill(fetch: Fetch) -> None:
            downloads.grow(asked, 50)
            with pytest.raises(AdapterSourceError, match="has no room"):
                downloads.grow(asked, 1)
            (fetch.folder / CONFIG_FILE).write_bytes(bytes(150))

        downloads.obtain(asked, fill)

        assert asked.directory.exists()


def test_a_connection_that_breaks_goes_on_where_it_was(tmp_path: Path) -> None:
    asked: list[int] = []
    data = bytes(range(200))
    with opening(tmp_path) as downloads:
        what = wanted(downloads, "a", 200)
        file = RemoteFile(name=CONFIG_FILE, num_bytes=200, checksum=None)
        downloads.obtain(what, lambda fetch: fetch.file(file, remote(data, cuts=[70, 0, 1], asked=asked)) and None)

        assert asked == [0, 70, 70, 71]
        assert data == (what.directory / CONFIG_FILE).read_bytes()


def test_a_connection_that_always_breaks_is_given_up_and_the_next_attempt_goes_on(tmp_path: Path) -> None:
    asked: list[int] = []
    file = RemoteFile(name=CONFIG_FILE, num_bytes=200, checksum=None)
    with opening(tmp_path) as downloads:
        what = wanted(downloads, "a", 200)
        broken = remote(bytes(200), cuts=[70] + [0] * fetching.MAX_CUTS)

        with pytest.raises(AdapterSourceError, match=f"broke off {CONFIG_FILE} 21 times"):
            downloads.obtain(what, lambda fetch: fetch.file(file, broken) and None)
        assert not what.directory.exists()
        downloads.obtain(what, lambda fetch: fetch.file(file, remote(bytes(200), asked=asked)) and None)

        assert asked == [70]
        assert what.directory.exists()


def test_what_a_failed_attempt_left_goes_before_all_that_is_finished(tmp_path: Path) -> None:
    file = RemoteFile(name=CONFIG_FILE, num_bytes=100, checksum=None)
    with opening(tmp_path, budget_bytes=300) as downloads:
        a = get(downloads, "a")
        broken = remote(bytes(100), cuts=[70] + [0] * fetching.MAX_CUTS)
        with pytest.raises(AdapterSourceError):
            downloads.obtain(wanted(downloads, "b", 100), lambda fetch: fetch.file(file, broken) and None)
        assert len(list((tmp_path / UNFINISHED).iterdir())) == 1

        get(downloads, "c", 200)

        assert a.exists()
        assert list((tmp_path / UNFINISHED).iterdir()) == []


def test_a_remote_that_cannot_begin_in_the_middle_begins_anew(tmp_path: Path) -> None:
    data, cuts = bytes(range(100)), [40]

    @contextmanager
    def open_at(start: int) -> Iterator[Body]:
        with remote(data, cuts=cuts)(0) as body:
            yield body

    with opening(tmp_path) as downloads:
        what = wanted(downloads, "a", 100)
        file = RemoteFile(name=CONFIG_FILE, num_bytes=100, checksum=None)
        downloads.obtain(what, lambda fetch: fetch.file(file, open_at) and None)

        assert data == (what.directory / CONFIG_FILE).read_bytes()


@pytest.mark.parametrize("kind", ["sha256", "md5", "git"])
def test_wrong_bytes_are_refused_and_not_kept(tmp_path: Path, kind: str) -> None:
    asked: list[int] = []
    file = RemoteFile(name=CONFIG_FILE, num_bytes=3, checksum=Checksum(kind=kind, value="00"))
    with opening(tmp_path) as downloads:
        what = wanted(downloads, "a", 3)
        for _ in range(2):
            with pytest.raises(AdapterSourceError, match=f"sent a wrong {CONFIG_FILE}: its {kind} hash is"):
                downloads.obtain(what, lambda fetch: fetch.file(file, remote(b"abc", asked=asked)) and None)

        assert asked == [0, 0]
        assert not what.directory.exists()


def test_more_bytes_than_announced_are_refused(tmp_path: Path) -> None:
    with opening(tmp_path) as downloads, pytest.raises(AdapterSourceError, match="sends more than the 10 bytes"):
        get(downloads, "a", 10, bytes(11))


def test_one_fetches_what_many_ask_for(tmp_path: Path) -> None:
    started, go_on = threading.Event(), threading.Event()
    num_fetches: list[None] = []
    file = RemoteFile(name=CONFIG_FILE, num_bytes=2, checksum=None)
    with opening(tmp_path) as downloads:

        def fill(fetch: Fetch) -> None:
            num_fetches.append(None)
            started.set()
            assert go_on.wait(WAIT_S)
            fetch.file(file, remote(b"{}"))

        asking = [threading.Thread(target=downloads.obtain, args=(wanted(downloads, "a", 2), fill)) for _ in range(4)]
        for thread in asking:
            thread.start()
        assert started.wait(WAIT_S)
        go_on.set()
        for thread in asking:
            thread.join(WAIT_S)

        assert len(num_fetches) == 1
        assert downloads.use(tmp_path / "kind" / "a")


def test_closing_ends_a_fetch(tmp_path: Path) -> None:
    downloads = open_downloads(tmp_path)

    def chunks() -> Iterator[bytes]:
        yield b"a"
        downloads.close()
        yield b"b"
        raise AssertionError("went on")

    @contextmanager
    def open_at(start: int) -> Iterator[Body]:
        yield Body(start=start, chunks=chunks())

    file = RemoteFile(name=CONFIG_FILE, num_bytes=9, checksum=None)
    with pytest.raises(AdapterSourceError, match="shutting down"):
        downloads.obtain(wanted(downloads, "a", 9), lambda fetch: fetch.file(file, open_at) and None)


def test_all_of_it_has_one_limit_of_time(tmp_path: Path) -> None:
    """A remote that sends byte after byte never stalls, and would go on for ever."""

    def endless() -> Iterator[bytes]:
        while True:
            yield b""

    @contextmanager
    def open_at(start: int) -> Iterator[Body]:
        yield Body(start=start, chunks=endless())

    file = RemoteFile(name=CONFIG_FILE, num_bytes=9, checksum=None)
    with (
        opening(tmp_path, limits=Limits(download_s=0.05)) as downloads,
        pytest.raises(AdapterSourceError, match=r"did not send all of it within 0\.05 s"),
    ):
        downloads.obtain(wanted(downloads, "a", 9), lambda fetch: fetch.file(file, open_at) and None)


def test_what_a_kill_left_is_gone_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / UNFINISHED / "half").mkdir(parents=True)
    (tmp_path / UNFINISHED / "half" / CONFIG_FILE).write_bytes(b"{")

    with opening(tmp_path, budget_bytes=1) as downloads:
        assert list((tmp_path / UNFINISHED).iterdir()) == []
        assert get(downloads, "a", 1).exists()


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    """Each would empty the other's unfinished downloads, and remove what the other uses."""
    with opening(tmp_path), pytest.raises(ConfigError, match="another server"):
        open_downloads(tmp_path)
    open_downloads(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_said_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="cannot be kept here"):
        open_downloads(tmp_path / "file" / "downloads")


def test_a_directory_that_somebody_removed_is_fetched_again(tmp_path: Path) -> None:
    with opening(tmp_path) as downloads:
        a = get(downloads, "a")
        (a / CONFIG_FILE).unlink()
        a.rmdir()

        assert not downloads.use(a)
        assert get(downloads, "a").exists()


def test_progress_is_told_every_few_seconds_and_not_for_every_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(fetching.time, "monotonic", lambda: float(next(clock)))
    caplog.set_level(logging.INFO, logger=fetching.__name__)
    file = RemoteFile(name=CONFIG_FILE, num_bytes=30_000_000, checksum=None)
    fetch = Fetch(
        tmp_path, name="a", source="s", num_bytes=30_000_000, limits=Limits(download_s=1e9), stop=threading.Event()
    )

    @contextmanager
    def open_at(start: int) -> Iterator[Body]:
        yield Body(start=start, chunks=iter([bytes(1_000_000)] * 30))

    fetch.file(file, open_at)

    lines = [record.getMessage() for record in caplog.records]
    assert 10 <= len(lines) <= 15
    assert lines[0] == "a: 2.0 of 30.0 MB, 0.2 MB/s"


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 120), st.booleans()), max_size=30),
    budget_bytes=st.integers(50, 300),
)
def test_the_folder_never_outgrows_its_budget(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int, bool]], budget_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("downloads")
    busy: set[Path] = set()
    with opening(folder, budget_bytes=budget_bytes, in_use=busy.__contains__) as downloads:
        for name, num_bytes, use in sizes:
            try:
                directory = get(downloads, str(name), num_bytes)
                (busy.add if use else busy.discard)(directory)
            except AdapterSourceError:
                assert num_bytes > budget_bytes - sum(file.stat().st_size for file in folder.rglob(CONFIG_FILE))

            assert sum(file.stat().st_size for file in folder.rglob(CONFIG_FILE)) <= budget_bytes
            assert all((path / CONFIG_FILE).exists() for path in busy)
