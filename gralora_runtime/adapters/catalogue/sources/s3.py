"""Adapters in a bucket: `s3://bucket/prefix` has each one's files below `prefix/NAME/`. Needs the extra `s3`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import s3fs
from botocore.exceptions import BotoCoreError, HTTPClientError
from botocore.exceptions import ConnectionError as NotReachedError
from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError

from gralora_runtime.adapters.catalogue.sources.downloads import Downloads, Wanted
from gralora_runtime.adapters.catalogue.sources.fetch import Body, Checksum, CutError, Fetch, RemoteFile
from gralora_runtime.adapters.catalogue.sources.files import KNOWN_FILES
from gralora_runtime.adapters.catalogue.sources.remote_name import RemoteName, parse_name
from gralora_runtime.adapters.catalogue.sources.s3_access import S3Access
from gralora_runtime.adapters.catalogue.sources.source import Found
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.errors import AdapterSourceError, ConfigError

SCHEME = "s3://"
CHUNK_BYTES = 1 << 20
NUM_TRIES = 2  # of one question, within its time
_URI = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?P<prefix>(?:/[A-Za-z0-9!_.*'()=-]+)*)/?")
_MD5 = re.compile(r'"[0-9a-f]{32}"')
_REVISION = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Object:
    """A file of the bucket as it is now."""

    key: str
    etag: str
    file: RemoteFile


class S3Source:
    """A revision is a digest of the ETags that an adapter's files have."""

    def __init__(self, uri: str, *, downloads: Downloads, follows: bool, access: S3Access) -> None:
        match = _URI.fullmatch(uri)
        if match is None:
            raise ConfigError(f"{uri}: is not {SCHEME}bucket/prefix")
        self.uri = uri
        self.follows = follows
        self._bucket = match["bucket"]
        self._prefix = match["prefix"].lstrip("/")
        self._downloads = downloads
        self._limits = downloads.limits
        same_place = hashlib.sha256(f"{access.endpoint}\n{self._prefix}".encode()).hexdigest()[:16]
        self._folder = downloads.folder / "s3" / f"{self._bucket}+{same_place}"
        self._files = self._connect(access)

    def find(self, name: str) -> Found | None:
        wanted = parse_name(name)
        if wanted is None or (wanted.revision and _REVISION.fullmatch(wanted.revision) is None):
            return None
        # What a revision names never changes, so one that is here needs no asking.
        if wanted.revision and self._downloads.use(self._folder / wanted.folder / wanted.revision):
            return self._found(wanted, wanted.revision)
        objects = self._ask(name, wanted)
        if not objects:
            return None
        revision = _revision(objects)
        if wanted.revision not in {"", revision}:
            return None
        self._obtain(name, self._folder / wanted.folder / revision, objects)
        return self._found(wanted, revision)

    def locate(self, _path: Path) -> Found | None:
        """Operators name directories of this machine only."""
        return None

    def names(self) -> Iterator[str]:
        return iter(())

    def close(self) -> None:
        self._downloads.close()
        sync(self._files.loop, self._files.s3.close, timeout=self._limits.answer_s)

    def _connect(self, access: S3Access) -> Any:
        limits = self._limits
        files = s3fs.S3FileSystem(
            anon=access.anonymous,
            endpoint_url=access.endpoint,
            key=access.key,
            secret=access.secret,
            token=access.token,
            client_kwargs={"region_name": access.region} if access.region else {},
            config_kwargs={
                "connect_timeout": limits.answer_s,
                "read_timeout": limits.stall_s,
                "retries": {"total_max_attempts": 1},  # s3fs counts them
                "response_checksum_validation": "when_required",  # what arrives is checked once, on the disk
            },
            use_listings_cache=False,
            skip_instance_cache=True,  # or another source's limits would be ours
        )
        files.retries = NUM_TRIES
        return files

    def _ask(self, name: str, wanted: RemoteName) -> list[_Object]:
        """Empty: there is no config, so no adapter."""
        found = [self._head(name, wanted, file) for file in KNOWN_FILES]
        assert KNOWN_FILES[0] == CONFIG_FILE
        return [each for each in found if each is not None] if found[0] is not None else []

    def _head(self, name: str, wanted: RemoteName, file: str) -> _Object | None:
        key = "/".join(part for part in (self._prefix, wanted.repo, file) if part)
        try:
            with self._errors(name):
                said = self._call("head_object", Key=key)
        except FileNotFoundError:
            return None
        except CutError as cause:
            raise self._error(name, f"cannot be reached ({cause})") from cause
        etag, num_bytes = said.get("ETag", ""), said["ContentLength"]
        return _Object(key=key, etag=etag, file=RemoteFile(name=file, num_bytes=num_bytes, checksum=_checksum(said)))

    def _obtain(self, name: str, directory: Path, objects: list[_Object]) -> None:
        def fill(fetch: Fetch) -> None:
            for each in objects:
                fetch.file(each.file, partial(self._open, name, each))

        num_bytes = sum(each.file.num_bytes for each in objects)
        self._downloads.obtain(Wanted(directory=directory, name=name, source=self.uri, num_bytes=num_bytes), fill)

    @contextmanager
    def _open(self, name: str, each: _Object, start: int) -> Iterator[Body]:
        try:
            with self._errors(name):
                # The same bytes as were announced, or none: an upload may be under way.
                answer = self._call("get_object", Key=each.key, Range=f"bytes={start}-", IfMatch=each.etag)
        except FileNotFoundError as cause:
            raise self._error(name, f"no longer has {each.file.name}") from cause
        stream = answer["Body"]
        try:
            yield Body(start=start, chunks=self._chunks(name, stream))
        finally:
            sync(self._files.loop, _close, stream, timeout=self._limits.answer_s)

    def _chunks(self, name: str, stream: Any) -> Iterator[bytes]:
        while True:
            with self._errors(name):
                chunk = sync(self._files.loop, stream.read, CHUNK_BYTES, timeout=self._limits.stall_s)
            if not chunk:
                return
            yield chunk

    def _call(self, method: str, **arguments: str) -> Any:
        return self._files.call_s3(method, Bucket=self._bucket, timeout=self._limits.answer_s, **arguments)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FSTimeoutError, TimeoutError) as cause:
            raise self._error(name, "sent nothing in time") from cause
        except FileNotFoundError:
            raise
        except PermissionError as cause:
            raise self._error(name, f"refuses access ({cause})") from cause
        except NotReachedError as cause:
            raise self._error(name, f"cannot be reached ({cause})") from cause
        except (HTTPClientError, aiohttp.ClientError) as cause:
            raise CutError(f"{type(cause).__name__}: {cause}") from cause
        except (OSError, BotoCoreError) as cause:
            raise self._error(name, f"gave no usable answer ({cause})") from cause

    def _found(self, wanted: RemoteName, revision: str) -> Found:
        directory = self._folder / wanted.folder / revision
        return Found(directory=directory, roots=(directory,), revision=revision)

    def _error(self, name: str, problem: str) -> AdapterSourceError:
        return AdapterSourceError(name, self.uri, problem, self._limits.retry_after_s)


def _revision(objects: list[_Object]) -> str:
    text = "\n".join(f"{each.file.name} {each.etag} {each.file.num_bytes}" for each in objects)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _checksum(said: dict[str, Any]) -> Checksum | None:
    """An ETag is an MD5 unless the object came in parts, or is encrypted with a key of somebody's own."""
    plain = said.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in said
    etag = said.get("ETag", "")
    return Checksum(kind="md5", value=etag.strip('"')) if plain and _MD5.fullmatch(etag) else None


async def _close(stream: Any) -> None:
    stream.close()
