"""Adapters in archives at a web server: what a stranger packed is taken apart within limits, or not at all."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.faulty_server import Answer, Fault, FaultyServer, Request, serving

from gralora_runtime.adapters.catalogue.sources.archive import HttpsSource
from gralora_runtime.adapters.catalogue.sources.downloads import UNFINISHED, Downloads
from gralora_runtime.adapters.catalogue.sources.fetch import Limits
from gralora_runtime.adapters.catalogue.sources.unpack import ArchiveError, ArchiveLimits, Unpacking
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.errors import AdapterSourceError, ConfigError

WEIGHTS = "adapter_model.safetensors"
FILES = {CONFIG_FILE: b'{"r": 8}', WEIGHTS: bytes(range(256)) * 1000, "golden.json": b"[]"}
LIMITS = Limits(pause_s=0.0)


class FileServer(FaultyServer):
    """Files by path, with an ETag unless that is taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] | None = None

    def answer(self, request: Request) -> Answer:
        if request.path not in self.files:
            return Answer(404)
        data = self.files[request.path]
        etag = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}
        return Answer(200, etag if self.headers is None else self.headers, data, ranges=True)


def tar_gz(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as out:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                out.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                out.addfile(info, io.BytesIO(member[1]))
    return packed.getvalue()


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in members:
            out.writestr(name, data)
    return packed.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def unpack(packed: bytes, folder: Path, kind: str, **limits: int) -> dict[str, bytes]:
    archive = folder / "packed"
    archive.write_bytes(packed)
    out = folder / "out"
    out.mkdir()
    unpacking = Unpacking(out, limits=ArchiveLimits(**limits), room=lambda num_bytes: None, keep_time=lambda: None)
    getattr(unpacking, kind)(archive)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("prefix", ["", "./", "adapter/", "./adapter/"])
@pytest.mark.parametrize(("kind", "pack"), [("tar", tar_gz), ("zip", zipped)])
def test_files_may_lie_in_one_folder(tmp_path: Path, kind: str, pack: Callable[..., bytes], prefix: str) -> None:
    assert unpack(pack(*((prefix + name, data) for name, data in FILES.items())), tmp_path, kind) == FILES


@pytest.mark.parametrize(
    "name", ["README.md", "a/b/" + CONFIG_FILE, "adapter_model.bin", CONFIG_FILE + "\n", "a/" + "x" * 300]
)
@pytest.mark.parametrize(("kind", "pack"), [("tar", tar_gz), ("zip", zipped)])
def test_only_known_files_are_taken(tmp_path: Path, kind: str, pack: Callable[..., bytes], name: str) -> None:
    with pytest.raises(ArchiveError, match=r"is no file of an adapter|leads elsewhere"):
        unpack(pack((name, b"")), tmp_path, kind)


@pytest.mark.parametrize(
    "name", ["../" + CONFIG_FILE, "/etc/" + CONFIG_FILE, "a/../../" + CONFIG_FILE, "..\\" + CONFIG_FILE]
)
@pytest.mark.parametrize(("kind", "pack"), [("tar", tar_gz), ("zip", zipped)])
def test_no_path_leads_out(tmp_path: Path, kind: str, pack: Callable[..., bytes], name: str) -> None:
    with pytest.raises(ArchiveError, match="leads elsewhere"):
        unpack(pack((name, b"{}")), tmp_path, kind)

    assert {path.name for path in tmp_path.rglob("*")} == {"packed", "out"}


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE]
)
def test_what_is_no_plain_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(ArchiveError, match="is no plain file"):
        unpack(tar_gz(special(CONFIG_FILE, kind, "/etc/passwd")), tmp_path, "tar")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="is no plain file"):
        unpack(zipped((zip_link(CONFIG_FILE), b"/etc/passwd")), tmp_path, "zip")


@pytest.mark.parametrize(("kind", "pack"), [("tar", tar_gz), ("zip", zipped)])
def test_a_file_that_is_there_twice_is_refused(tmp_path: Path, kind: str, pack: Callable[..., bytes]) -> None:
    with pytest.raises(ArchiveError, match="is in the archive twice"):
        unpack(pack((CONFIG_FILE, b"{}"), ("a/" + CONFIG_FILE, b"[]")), tmp_path, kind)


@pytest.mark.parametrize(("kind", "pack"), [("tar", tar_gz), ("zip", zipped)])
def test_a_bomb_is_refused_before_it_is_written(tmp_path: Path, kind: str, pack: Callable[..., bytes]) -> None:
    with pytest.raises(ArchiveError, match="unpacks to more than 1000 bytes"):
        unpack(pack((CONFIG_FILE, b"{}"), (WEIGHTS, bytes(1 << 20))), tmp_path, kind, unpacked_bytes=1000)

    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) == 2


@pytest.mark.parametrize(("kind", "pack"), [("tar", tar_gz), ("zip", zipped)])
def test_the_number_of_entries_has_a_limit(tmp_path: Path, kind: str, pack: Callable[..., bytes]) -> None:
    folders = (
        [(f"{n}/", b"") for n in range(3)] if kind == "zip" else [special(f"{n}", tarfile.DIRTYPE) for n in range(3)]
    )
    with pytest.raises(ArchiveError, match="more than 2 entries"):
        unpack(pack(*folders), tmp_path, kind, num_entries=2)


def test_a_zip_that_says_less_than_it_holds_is_refused(tmp_path: Path) -> None:
    packed = zipped((CONFIG_FILE, bytes(1000)))
    length = (1000).to_bytes(4, "little")
    assert packed.count(length) == 2

    with pytest.raises(ArchiveError):
        unpack(packed.replace(length, (10).to_bytes(4, "little")), tmp_path, "zip")


def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    """A pax header is read in one piece: compressed, a gigabyte of it is a megabyte."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as out:
        info = tarfile.TarInfo(CONFIG_FILE)
        info.pax_headers = {"comment": "x" * (4 << 20)}
        out.addfile(info)

    with pytest.raises(ArchiveError, match="says more than"):
        unpack(packed.getvalue(), tmp_path, "tar")


def test_a_directory_of_a_zip_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="says more than"):
        unpack(zipped(*((f"{n:0200}/", b"") for n in range(6000))), tmp_path, "zip")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["tar", "zip"]), places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)
)
@example(kind="zip", places=[(0.99609375, 1)])  # its directory says that a member begins before the archive
def test_a_damaged_archive_is_refused_or_gives_known_files(
    tmp_path_factory: pytest.TempPathFactory, kind: str, places: list[tuple[float, int]]
) -> None:
    pack = tar_gz if kind == "tar" else zipped
    packed = bytearray(pack(*((name, data[:300]) for name, data in FILES.items())))
    for place, value in places:
        packed[int(place * (len(packed) - 1))] = value
    folder = tmp_path_factory.mktemp("damaged")
    try:
        found = unpack(bytes(packed), folder, kind)
    except ArchiveError:
        found = {}

    assert found.keys() <= FILES.keys()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving(FileServer()) as server:
        yield server


@contextmanager
def opening(
    server: FileServer,
    folder: Path,
    ending: str = ".tar.gz",
    *,
    limits: Limits = LIMITS,
    budget_bytes: int = 1 << 20,
    archives: ArchiveLimits | None = None,
) -> Iterator[HttpsSource]:
    downloads = Downloads(folder, budget_bytes=budget_bytes, in_use=lambda path: False, limits=limits, grace_s=0.0)
    source = HttpsSource(
        f"{server.endpoint}/adapters/{{name}}{ending}",
        downloads=downloads,
        follows=True,
        archives=archives or ArchiveLimits(),
        loopback_http=True,
    )
    try:
        yield source
    finally:
        source.close()
        downloads.close()


@pytest.mark.parametrize(("ending", "pack"), [(".tar.gz", tar_gz), (".zip", zipped)])
@pytest.mark.parametrize("name", ["name", "org/name"])
def test_an_adapter_is_found(
    server: FileServer, tmp_path: Path, ending: str, pack: Callable[..., bytes], name: str
) -> None:
    server.files[f"/adapters/{name}{ending}"] = pack(*FILES.items())
    with opening(server, tmp_path, ending) as source:
        found = source.find(name)
        assert found is not None
        assert source.find(name) == found
        assert source.find(f"{name}@{found.revision}") == found
        assert source.find("other") is None

    assert {path.name: path.read_bytes() for path in found.directory.iterdir()} == FILES
    assert len([request for request in server.sent if request.method == "GET"]) == 1
    assert list((tmp_path / UNFINISHED).iterdir()) == []


def test_a_new_revision_is_another_directory(server: FileServer, tmp_path: Path) -> None:
    server.files["/adapters/name.tar.gz"] = tar_gz(*FILES.items())
    with opening(server, tmp_path) as source:
        old = source.find("name")
        server.files["/adapters/name.tar.gz"] = tar_gz((CONFIG_FILE, b"{}"))
        new = source.find("name")
        assert old is not None
        assert new is not None
        assert source.find(f"name@{old.revision}") == old

    assert (new.directory / CONFIG_FILE).read_bytes() == b"{}"
    assert (old.directory / CONFIG_FILE).read_bytes() == FILES[CONFIG_FILE]


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/../x", "a/b/c", "x@main", "x?y", "x#y", "x%2f", "x\0", "x\n", "{name}"]
)
def test_a_hostile_name_reaches_nobody(server: FileServer, tmp_path: Path, name: str) -> None:
    with opening(server, tmp_path) as source:
        assert source.find(name) is None

    assert server.sent == []


def test_a_cut_connection_goes_on_where_it_was(server: FileServer, tmp_path: Path) -> None:
    packed = tar_gz(*FILES.items())
    server.files["/adapters/name.tar.gz"] = packed
    server.faults["name.tar.gz"] = Fault(cut_after=[100, 200])
    with opening(server, tmp_path) as source:
        assert source.find("name") is not None

    assert [request.range for request in server.bodies("name.tar.gz")] == ["", "bytes=100-", "bytes=300-"]
    assert sum(request.num_bytes for request in server.bodies("name.tar.gz")) == len(packed)


@pytest.mark.parametrize(
    ("headers", "problem"),
    [({}, "neither an ETag nor a date"), ({"ETag": '"a"', "Transfer-Encoding": "chunked"}, "does not say how long")],
)
def test_an_archive_of_which_too_little_is_said_is_refused(
    server: FileServer, tmp_path: Path, headers: dict[str, str], problem: str
) -> None:
    server.files["/adapters/name.tar.gz"] = b""
    server.headers = headers
    with opening(server, tmp_path) as source, pytest.raises(AdapterSourceError, match=problem):
        source.find("name")


def test_an_archive_that_is_too_long_is_not_fetched(server: FileServer, tmp_path: Path) -> None:
    server.files["/adapters/name.tar.gz"] = bytes(101)
    archives = ArchiveLimits(packed_bytes=100)
    with (
        opening(server, tmp_path, archives=archives) as source,
        pytest.raises(AdapterSourceError, match="101 bytes, and 100 are allowed"),
    ):
        source.find("name")

    assert server.bodies("name.tar.gz") == []


def test_what_unpacks_beyond_the_budget_is_refused(server: FileServer, tmp_path: Path) -> None:
    server.files["/adapters/name.tar.gz"] = tar_gz((CONFIG_FILE, b"{}"), (WEIGHTS, bytes(1 << 20)))
    with (
        opening(server, tmp_path, budget_bytes=1 << 20) as source,
        pytest.raises(AdapterSourceError, match="has no room"),
    ):
        source.find("name")


@pytest.mark.parametrize(
    ("packed", "problem"),
    [(b"no archive", "cannot be read"), (tar_gz((WEIGHTS, b"")), f"without {CONFIG_FILE}")],
    ids=["garbage", "no config"],
)
def test_an_archive_that_is_refused_leaves_nothing(
    server: FileServer, tmp_path: Path, packed: bytes, problem: str
) -> None:
    server.files["/adapters/name.tar.gz"] = packed
    with opening(server, tmp_path) as source, pytest.raises(AdapterSourceError, match=problem):
        source.find("name")

    assert list(tmp_path.rglob("packed")) + list(tmp_path.rglob(f"https/**/{CONFIG_FILE}")) == []


@pytest.mark.parametrize(
    "uri",
    [
        "https://host/x.tar.gz",
        "https://host/{name}.tar",
        "https://host/{name}/{name}.zip",
        "https://{name}.zip",
        "https://user:secret@host/{name}.zip",
        "https://host/{name}.zip?token=secret",
        "http://host/{name}.zip",
        "http://127.0.0.1/{name}.zip",
    ],
)
def test_an_address_that_makes_no_sense_is_refused_at_start(tmp_path: Path, uri: str) -> None:
    downloads = Downloads(tmp_path, budget_bytes=1, in_use=lambda path: False, limits=LIMITS)
    with pytest.raises(ConfigError, match=r"is not https://|https only"):
        HttpsSource(uri, downloads=downloads, follows=True, archives=ArchiveLimits())
    downloads.close()
