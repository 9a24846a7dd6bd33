"""Pushing an adapter: what is sent, what is not sent again, and what the command line makes of it."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.both_clients import Connect, call, connect_async, connect_sync
from support.grpc_harness import served
from support.uploading import CONFIG, WEIGHTS, contents, manifest_of

from gralora_runtime.adapters.catalogue.upload import Upload
from gralora_runtime.adapters.catalogue.uploads import UploadLimits, Uploads
from gralora_runtime.errors import AdapterRejectedError, DrainingError
from gralora_server.cli.app import run
from gralora_server.cli.output import ExitCode
from gralora_server.client import FailedPreconditionError, InvalidArgumentError, UnavailableError
from gralora_server.client.push import CHUNK_BYTES

both = pytest.mark.parametrize("connect", [connect_sync, connect_async], ids=["sync", "async"])
FILES = contents(0, 3 * CHUNK_BYTES + 17) | {"README.md": b"# What it is\n", "golden.json": b"{}"}
MANIFEST = manifest_of("bard", FILES)


@pytest.fixture
def uploads(tmp_path: Path) -> Iterator[Uploads]:
    kept = Uploads(tmp_path / "uploads", limits=UploadLimits(), in_use=lambda _: False)
    yield kept
    kept.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An adapter as a trainer leaves it, with files that nobody needs to serve it."""
    folder = tmp_path / "trained"
    (folder / "checkpoint-10").mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"x" * 1000)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def left_by_trainer(directory: Path) -> Path:
    """A directory with the adapter in one below it."""
    run = directory.parent / "run"
    shutil.copytree(directory, run / "checkpoint-10", dirs_exist_ok=True)
    return run


class Writes:
    """What servers were sent, and a piece that fails."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.pieces: list[tuple[str, int, int]] = []
        self.failing: set[int] = set()  # of all pieces
        self._write = Upload.write

        def write(upload: Upload, file: str, offset: int, data: bytes) -> None:
            self._record(upload, file, offset, data)

        patch.setattr(Upload, "write", write)

    def _record(self, upload: Upload, file: str, offset: int, data: bytes) -> None:
        self.pieces.append((file, offset, len(data)))
        if len(self.pieces) in self.failing:
            raise DrainingError
        self._write(upload, file, offset, data)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    return Writes(monkeypatch)


@both
async def test_a_directory_is_pushed_and_its_adapter_comes_back(
    connect: Connect, uploads: Uploads, directory: Path
) -> None:
    told: list[tuple[int, int]] = []
    async with served() as s, connect(s.port) as client:
        s.engine.adapters.uploads = uploads
        adapter = await call(
            client, "adapters.push", directory, "bard", pin=True, progress=lambda *both: told.append(both)
        )
    kept = uploads.find("bard").directory

    assert (adapter.name, adapter.pinned) == ("bard", True)
    assert s.engine.adapters.calls == [("load", "bard", kept, True)]
    assert {path.name: path.read_bytes() for path in kept.iterdir() if path.name != "manifest.json"} == FILES
    assert told == sorted(told)
    assert (told[0], told[-1]) == ((0, MANIFEST.num_bytes), (MANIFEST.num_bytes, MANIFEST.num_bytes))


@both
async def test_a_push_that_broke_off_goes_on_where_it_was(
    connect: Connect, uploads: Uploads, directory: Path, writes: Writes
) -> None:
    writes.failing = {4}
    async with served() as s, connect(s.port) as client:
        s.engine.adapters.uploads = uploads
        await call(client, "adapters.push", directory, "bard")

    assert writes.pieces[0] == (CONFIG, 0, len(FILES[CONFIG]))
    assert writes.pieces[3:5] == [(WEIGHTS, 2 * CHUNK_BYTES, CHUNK_BYTES)] * 2
    assert [piece for piece in writes.pieces if piece == writes.pieces[0]] == [writes.pieces[0]]
    assert uploads.find("bard") is not None


@both
async def test_a_push_that_breaks_off_twice_is_over_and_the_next_one_goes_on(
    connect: Connect, uploads: Uploads, directory: Path, writes: Writes
) -> None:
    writes.failing = {3, 4}
    async with served() as s, connect(s.port) as client:
        s.engine.adapters.uploads = uploads
        with pytest.raises(UnavailableError):
            await call(client, "adapters.push", directory, "bard")
        assert len(writes.pieces) == 4
        await call(client, "adapters.push", str(directory), "bard")

    assert writes.pieces[4] == (WEIGHTS, CHUNK_BYTES, CHUNK_BYTES)


@both
async def test_the_same_push_again_sends_no_bytes(
    connect: Connect, uploads: Uploads, directory: Path, writes: Writes
) -> None:
    async with served() as s, connect(s.port) as client:
        s.engine.adapters.uploads = uploads
        await call(client, "adapters.push", directory, "bard")
        sent = len(writes.pieces)
        await call(client, "adapters.push", directory, "bard")

    assert len(writes.pieces) == sent
    assert len(s.engine.adapters.calls) == 2


@both
async def test_a_push_that_cannot_be_says_why(connect: Connect, uploads: Uploads, directory: Path) -> None:
    async with served() as s, connect(s.port) as client:
        with pytest.raises(FailedPreconditionError, match="without a state directory"):
            await call(client, "adapters.push", directory, "bard")
        s.engine.adapters.uploads = uploads
        with pytest.raises(InvalidArgumentError, match=r"header\.name"):
            await call(client, "adapters.push", directory, "../bard")
        with pytest.raises(FileNotFoundError, match=CONFIG):
            await call(client, "adapters.push", directory / "checkpoint-10", "bard")
        with pytest.raises(FileNotFoundError, match="; run/checkpoint-10 has one: name that directory"):
            await call(client, "adapters.push", left_by_trainer(directory), "bard")
        s.engine.adapters.error = AdapterRejectedError("bard", ["it uses DoRA"])
        with pytest.raises(FailedPreconditionError, match="it uses DoRA"):
            await call(client, "adapters.push", directory, "bard")


@both
async def test_what_was_pushed_is_deleted_with_its_adapter(connect: Connect, uploads: Uploads, directory: Path) -> None:
    async with served() as s, connect(s.port) as client:
        s.engine.adapters.uploads = uploads
        await call(client, "adapters.push", directory, "poet")
        await call(client, "adapters.unload", "poet")
        assert uploads.has("poet")
        freed = await call(client, "adapters.unload", "poet", delete_upload=True)
        assert not uploads.has("poet")
        with pytest.raises(FailedPreconditionError, match="there is none"):
            await call(client, "adapters.unload", "poet", delete_upload=True)

    assert (freed.name, freed.pool_bytes_freed) == ("poet", 1000)


async def gralora(*arguments: Any, port: int) -> int:
    return await asyncio.to_thread(run, [*map(str, arguments), "--address", f"127.0.0.1:{port}"])


async def test_the_command_pushes_and_prints_the_adapter(uploads: Uploads, directory: Path, capsys) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        code = await gralora("adapters", "push", directory, "--name", "bard", "--pin", "--json", port=s.port)
    out, err = capsys.readouterr()

    assert code == ExitCode.OK
    assert (json.loads(out)["name"], json.loads(out)["pinned"]) == ("bard", True)
    assert re.fullmatch(r"sending files: (\d+) of \1, [\d.]+ s\n", err)


async def test_the_command_says_what_it_cannot_push(uploads: Uploads, directory: Path, capsys) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        missing = await gralora("adapters", "push", directory / "checkpoint-10", "--name", "bard", port=s.port)
        s.engine.adapters.error = AdapterRejectedError("bard", ["it uses DoRA"])
        unfit = await gralora("adapters", "push", directory, "--name", "bard", port=s.port)
    err = capsys.readouterr().err

    assert (missing, unfit) == (ExitCode.USAGE, ExitCode.UNFIT_ADAPTER)
    assert f"cannot read {directory / 'checkpoint-10' / CONFIG}: No such file or directory" in err
    assert "it uses DoRA" in err


async def test_the_command_deletes_what_was_pushed(uploads: Uploads, directory: Path, capsys) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        await gralora("adapters", "push", directory, "--name", "poet", port=s.port)
        capsys.readouterr()
        codes = [await gralora("adapters", "unload", "poet", "--delete-upload", port=s.port) for _ in range(2)]
    out, err = capsys.readouterr()

    assert codes == [ExitCode.OK, ExitCode.FAILED]
    assert out == "poet: unloaded; 1000 B freed in the pool, 2.0 KiB in host memory; what was pushed is deleted\n"
    assert "the upload of adapter 'poet' cannot be deleted: there is none" in err
