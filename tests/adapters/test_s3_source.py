"""Adapters in a bucket: moto's server on loopback, behind one that breaks off and stalls."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.faulty_server import Fault
from support.s3_server import S3Front, empty_bucket, moto_server

from gralora_runtime.adapters.catalogue.sources.downloads import UNFINISHED, Downloads
from gralora_runtime.adapters.catalogue.sources.fetch import Limits
from gralora_runtime.adapters.catalogue.sources.s3 import S3Source
from gralora_runtime.adapters.catalogue.sources.s3_access import S3Access
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.errors import AdapterSourceError, ConfigError

WEIGHTS = "adapter_model.safetensors"
FILES = {CONFIG_FILE: b'{"r": 8}', WEIGHTS: bytes(range(256)) * 10_000, "golden.json": b"[]"}
LIMITS = Limits(pause_s=0.0)


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    with moto_server() as port:
        yield port


@pytest.fixture
def bucket(moto: int) -> Iterator[S3Front]:
    with empty_bucket(moto) as front:
        yield front


@contextmanager
def opening(
    bucket: S3Front,
    folder: Path,
    uri: str = "s3://bucket/prefix",
    *,
    limits: Limits = LIMITS,
    budget_bytes: int = 1 << 24,
    in_use: Callable[[Path], bool] = lambda path: False,
) -> Iterator[S3Source]:
    downloads = Downloads(folder, budget_bytes=budget_bytes, in_use=in_use, limits=limits, grace_s=0.0)
    access = S3Access(endpoint=bucket.endpoint, region="us-east-1", key="key", secret="secret")
    try:
        source = S3Source(uri, downloads=downloads, follows=True, access=access)
        yield source
        source.close()
    finally:
        downloads.close()


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", ["name", "org/name", "a--b", "na.me_1"])
def test_an_adapter_is_found_and_only_its_files_are_fetched(bucket: S3Front, tmp_path: Path, name: str) -> None:
    bucket.put(name, {**FILES, "optimizer.pt": b"huge"})
    with opening(bucket, tmp_path) as source:
        found = source.find(name)

    assert found is not None
    assert found.directory.name == found.revision
    assert content(found.directory) == FILES
    assert bucket.bodies("optimizer.pt") == []
    assert list((tmp_path / UNFINISHED).iterdir()) == []


def test_a_bucket_without_a_prefix(bucket: S3Front, tmp_path: Path) -> None:
    bucket.put("name", FILES)
    with opening(bucket, tmp_path, "s3://bucket") as source:
        assert source.find("name") is None
        assert source.find("prefix/name") is not None


def test_what_is_here_is_not_fetched_again(bucket: S3Front, tmp_path: Path) -> None:
    bucket.put("name", FILES)
    with opening(bucket, tmp_path) as source:
        first = source.find("name")
        assert source.find("name") == first

    assert len(bucket.bodies(WEIGHTS)) == 1


def test_what_the_bucket_does_not_have_is_not_found(bucket: S3Front, tmp_path: Path) -> None:
    bucket.put("empty", {"README.md": b"hello"})
    with opening(bucket, tmp_path) as source:
        assert source.find("name") is None
        assert source.find("empty") is None
        assert list(source.names()) == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../x",
        "org/..",
        "org/../x",
        "/x",
        "x/",
        "a/b/c",
        "x@",
        "x@main",
        "x?y",
        "x%2f",
        "x\0",
        "x\n",
        "ẍ",
        "x" * 97,
    ],
)
def test_a_hostile_name_reaches_nobody(bucket: S3Front, tmp_path: Path, name: str) -> None:
    with opening(bucket, tmp_path) as source:
        before = sorted(tmp_path.rglob("*"))

        assert source.find(name) is None
        assert bucket.sent == []
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "uri", ["s3://", "s3://B", "s3://bucket/a b", "s3://bucket//a", "s3://bucket/a?b", "s3://u:p@bucket"]
)
def test_an_address_that_makes_no_sense_is_refused_at_start(bucket: S3Front, tmp_path: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match="is not s3://bucket/prefix"), opening(bucket, tmp_path, uri):
        pass


def test_a_new_revision_is_another_directory_and_the_old_one_stays_while_it_is_used(
    bucket: S3Front, tmp_path: Path
) -> None:
    num_bytes = sum(len(data) for data in FILES.values())
    busy: set[Path] = set()
    bucket.put("name", FILES)
    with opening(bucket, tmp_path, budget_bytes=2 * num_bytes, in_use=busy.__contains__) as source:
        old = source.find("name")
        assert old is not None
        busy.add(old.directory)
        bucket.put("name", {CONFIG_FILE: b'{"r": 9}'})
        new = source.find("name")
        assert new is not None
        assert content(old.directory) == FILES
        assert content(new.directory) == {**FILES, CONFIG_FILE: b'{"r": 9}'}

        assert source.find(f"name@{old.revision}") == old
        assert source.find(f"name@{new.revision}") == new
        assert source.find("name@" + "0" * 32) is None

        bucket.put("name", {CONFIG_FILE: b'{"r": 7}'})
        last = source.find("name")
        assert last is not None
        assert [found.directory.exists() for found in (old, new, last)] == [True, False, True]


def test_a_cut_connection_goes_on_where_it_was(bucket: S3Front, tmp_path: Path) -> None:
    bucket.put("name", FILES)
    bucket.faults[WEIGHTS] = Fault(cut_after=[2_000_000])
    with opening(bucket, tmp_path) as source:
        found = source.find("name")

    assert found is not None
    assert content(found.directory) == FILES
    first, second = bucket.bodies(WEIGHTS)
    start = int(second.range.removeprefix("bytes=").removesuffix("-"))
    # What the client's buffers held when the connection broke is lost with it, and has to come again.
    assert 0 < start <= first.num_bytes == 2_000_000
    assert second.num_bytes == len(FILES[WEIGHTS]) - start


def test_a_server_that_stalls_is_given_up_and_the_next_attempt_goes_on(bucket: S3Front, tmp_path: Path) -> None:
    bucket.put("name", FILES)
    bucket.faults[WEIGHTS] = Fault(stall_after=1_000_000)
    with opening(bucket, tmp_path, limits=dataclasses.replace(LIMITS, stall_s=0.3)) as source:
        with pytest.raises(AdapterSourceError, match="sent nothing in time") as caught:
            source.find("name")
        assert caught.value.retry_after_s == LIMITS.retry_after_s
        del bucket.faults[WEIGHTS]
        found = source.find("name")

    assert found is not None
    assert content(found.directory) == FILES
    assert bucket.bodies(WEIGHTS)[-1].num_bytes < len(FILES[WEIGHTS])


def test_a_server_that_sends_a_byte_at_a_time_is_given_up(bucket: S3Front, tmp_path: Path) -> None:
    bucket.put("name", FILES)
    bucket.faults[WEIGHTS] = Fault(drip=True)
    with (
        opening(bucket, tmp_path, limits=dataclasses.replace(LIMITS, download_s=0.5)) as source,
        pytest.raises(AdapterSourceError, match=r"did not send all of it within 0\.5 s"),
    ):
        source.find("name")


def test_a_bucket_that_never_answers_is_given_up(
    bucket: S3Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Front, "answer", lambda self, request: self.closing.wait())
    with (
        opening(bucket, tmp_path, limits=dataclasses.replace(LIMITS, answer_s=0.3)) as source,
        pytest.raises(AdapterSourceError, match="sent nothing in time"),
    ):
        source.find("name")


@pytest.mark.parametrize(
    ("status", "problem"), [(403, "refuses access"), (500, "no usable answer"), (503, "no usable answer")]
)
def test_a_bucket_that_gives_no_answer_is_said(bucket: S3Front, tmp_path: Path, status: int, problem: str) -> None:
    bucket.faults[CONFIG_FILE] = Fault(status=status)
    with opening(bucket, tmp_path) as source, pytest.raises(AdapterSourceError, match=problem):
        source.find("name")


def test_a_bucket_that_is_not_there_is_said(bucket: S3Front, tmp_path: Path) -> None:
    bucket.port = 1  # nobody listens there
    with opening(bucket, tmp_path) as source, pytest.raises(AdapterSourceError, match="cannot be reached"):
        source.find("name")


def test_wrong_bytes_are_refused(bucket: S3Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("name", FILES)
    answer = S3Front.answer

    def flipped(self: S3Front, request: object) -> object:
        said = answer(self, request)
        if request.method == "GET" and request.file == WEIGHTS:
            said.body = b"\xff" + said.body[1:]
        return said

    monkeypatch.setattr(S3Front, "answer", flipped)
    with opening(bucket, tmp_path) as source, pytest.raises(AdapterSourceError, match=f"wrong {WEIGHTS}: its md5"):
        source.find("name")

    assert list(tmp_path.rglob(f"s3/**/{CONFIG_FILE}")) == []


def test_an_upload_under_way_is_never_half_of_the_one_and_half_of_the_other(bucket: S3Front, tmp_path: Path) -> None:
    """The file is replaced after it was announced: it is refused, and found whole when it is asked for again."""
    bucket.put("name", FILES)
    newer = {**FILES, WEIGHTS: bytes(len(FILES[WEIGHTS]))}
    bucket.faults[WEIGHTS] = Fault(cut_after=[1_000_000])
    with opening(bucket, tmp_path) as source:
        replaced = pytest.MonkeyPatch()
        answer = S3Front.answer

        def replacing(self: S3Front, request: object) -> object:
            if request.method == "GET" and request.file == WEIGHTS and request.range != "bytes=0-":
                bucket.put("name", newer)
            return answer(self, request)

        replaced.setattr(S3Front, "answer", replacing)
        with replaced.context(), pytest.raises(AdapterSourceError, match="no usable answer"):
            source.find("name")
        replaced.undo()
        found = source.find("name")

    assert found is not None
    assert content(found.directory) == newer


def test_an_object_that_came_in_parts_has_no_checksum_but_its_size(bucket: S3Front, tmp_path: Path) -> None:
    bucket.put("name", FILES)
    upload = bucket.client.create_multipart_upload(Bucket="bucket", Key=f"prefix/name/{WEIGHTS}")
    where = {"Bucket": "bucket", "Key": f"prefix/name/{WEIGHTS}", "UploadId": upload["UploadId"]}
    parts = [
        {"PartNumber": n, "ETag": bucket.client.upload_part(**where, PartNumber=n, Body=data)["ETag"]}
        for n, data in ((1, bytes(5 << 20)), (2, b"end"))
    ]
    etag = bucket.client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})["ETag"]
    assert etag.endswith('-2"')
    with opening(bucket, tmp_path) as source:
        found = source.find("name")

    assert found is not None
    assert (found.directory / WEIGHTS).read_bytes() == bytes(5 << 20) + b"end"


def test_an_object_encrypted_with_a_key_of_somebodys_own_has_an_etag_that_is_no_md5(
    bucket: S3Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("name", FILES)
    answer = S3Front.answer

    def encrypted(self: S3Front, request: object) -> object:
        request.headers = {key: value for key, value in request.headers.items() if key != "if-match"}
        said = answer(self, request)
        said.headers.update({"ETag": json.dumps("0" * 32), "x-amz-server-side-encryption": "aws:kms"})
        return said

    monkeypatch.setattr(S3Front, "answer", encrypted)
    with opening(bucket, tmp_path) as source:
        found = source.find("name")

    assert found is not None
    assert content(found.directory) == FILES


def test_an_adapter_over_the_budget_is_refused_before_a_byte_is_fetched(bucket: S3Front, tmp_path: Path) -> None:
    bucket.put("name", FILES)
    no_room = pytest.raises(AdapterSourceError, match="budget of 1000 bytes has no room")
    with opening(bucket, tmp_path, budget_bytes=1000) as source, no_room:
        source.find("name")

    assert [request for request in bucket.sent if request.method == "GET"] == []
