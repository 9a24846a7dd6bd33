"""Adapters that are an archive each at a web server: `https://host/path/{name}.tar.gz`, or `.zip`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import quote

from gralora_runtime.adapters.catalogue.sources.downloads import Downloads, Wanted
from gralora_runtime.adapters.catalogue.sources.fetch import Fetch, RemoteFile
from gralora_runtime.adapters.catalogue.sources.remote_name import RemoteName, parse_name
from gralora_runtime.adapters.catalogue.sources.source import Found
from gralora_runtime.adapters.catalogue.sources.unpack import ArchiveError, ArchiveLimits, Unpacking
from gralora_runtime.adapters.catalogue.sources.web import Asked, Web
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.errors import AdapterSourceError, ConfigError

PLACE = "{name}"
PACKED_FILE = "packed"
_URI = re.compile(r"https?://[^/?#@\s{}]+/[^?#\s{}]*\{name\}(?P<kind>\.tar\.gz|\.zip)")
_REVISION = re.compile(r"[0-9a-f]{32}")
_LENGTH = re.compile(r"[0-9]{1,18}")


class HttpsSource:
    """A revision is a digest of the ETag that the archive has, or of its date where there is none."""

    def __init__(
        self,
        uri: str,
        *,
        downloads: Downloads,
        follows: bool,
        archives: ArchiveLimits,
        loopback_http: bool = False,
    ) -> None:
        match = _URI.fullmatch(uri)
        if match is None:
            raise ConfigError(f"{uri}: is not https://host/path/{PLACE}.tar.gz or .zip")
        self.uri = uri
        self.follows = follows
        self._kind = match["kind"]
        self._downloads = downloads
        self._limits = downloads.limits
        self._archives = archives
        self._folder = downloads.folder / "https" / hashlib.sha256(uri.encode()).hexdigest()[:32]
        self._web = Web(limits=self._limits, loopback_http=loopback_http)
        self._web.check_url(uri.replace(PLACE, "name"))

    def find(self, name: str) -> Found | None:
        wanted = parse_name(name)
        if wanted is None or (wanted.revision and _REVISION.fullmatch(wanted.revision) is None):
            return None
        # What a revision names never changes, so one that is here needs no asking.
        if wanted.revision and self._downloads.use(self._folder / wanted.folder / wanted.revision):
            return self._found(wanted, wanted.revision)
        asked = Asked(url=self.uri.replace(PLACE, quote(wanted.repo)), name=name, source=self.uri)
        said = self._web.head(asked)
        if said is None:
            return None
        revision = self._revision(name, said.get("etag", "") or said.get("last-modified", ""))
        if wanted.revision not in {"", revision}:
            return None
        num_bytes = self._length(name, said.get("content-length", ""))
        self._obtain(asked, self._folder / wanted.folder / revision, num_bytes)
        return self._found(wanted, revision)

    def locate(self, _path: Path) -> Found | None:
        """Operators name directories of this machine only."""
        return None

    def names(self) -> Iterator[str]:
        return iter(())

    def close(self) -> None:
        self._downloads.close()
        self._web.close()

    def _revision(self, name: str, said: str) -> str:
        if not said:
            raise self._error(name, "gives the archive neither an ETag nor a date, so that no revision is known")
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    def _length(self, name: str, said: str) -> int:
        if _LENGTH.fullmatch(said) is None:
            raise self._error(name, "does not say how long the archive is")
        if int(said) > self._archives.packed_bytes:
            raise self._error(name, f"has an archive of {said} bytes, and {self._archives.packed_bytes} are allowed")
        return int(said)

    def _obtain(self, asked: Asked, directory: Path, num_bytes: int) -> None:
        wanted = Wanted(directory=directory, name=asked.name, source=self.uri, num_bytes=num_bytes)

        def fill(fetch: Fetch) -> None:
            packed = fetch.file(
                RemoteFile(name=PACKED_FILE, num_bytes=num_bytes, checksum=None),
                partial(self._web.open, asked, num_bytes),
            )
            try:
                self._unpack(packed, fetch, wanted)
            finally:
                packed.unlink()  # what cannot be unpacked now will not be later

        self._downloads.obtain(wanted, fill)

    def _unpack(self, packed: Path, fetch: Fetch, wanted: Wanted) -> None:
        room = partial(self._downloads.grow, wanted)
        unpacking = Unpacking(fetch.folder, limits=self._archives, room=room, keep_time=fetch.keep_time)
        try:
            (unpacking.tar if self._kind == ".tar.gz" else unpacking.zip)(packed)
        except ArchiveError as cause:
            raise fetch.error(f"sent an archive that is refused: {cause}") from cause
        if not (fetch.folder / CONFIG_FILE).exists():
            raise fetch.error(f"sent an archive without {CONFIG_FILE}")

    def _found(self, wanted: RemoteName, revision: str) -> Found:
        directory = self._folder / wanted.folder / revision
        return Found(directory=directory, roots=(directory,), revision=revision)

    def _error(self, name: str, problem: str) -> AdapterSourceError:
        return AdapterSourceError(name, self.uri, problem, self._limits.retry_after_s)
