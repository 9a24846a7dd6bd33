"""Adapters that clients sent: what has come so far, what is whole, and which of a name's uploads is the one to serve.

Knows no transport, and not whether an adapter can be loaded: whoever tried says so (`accept`, `reject`, `set_back`).

    tmp/<name and manifest>/     unfinished: its files, each from the beginning to where it broke off, and its manifest
    <name>/<manifest>/           whole, checked, in one step; found once the name's record has it
    <name>/record.json           the name, and its accepted uploads, the newest last

Both parts of a path are SHA-256, so no name leaves the folder and no two share one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from gralora_runtime.adapters.catalogue.durable import sync_directory
from gralora_runtime.adapters.catalogue.manifest import Manifest
from gralora_runtime.adapters.catalogue.sources.source import Found
from gralora_runtime.adapters.catalogue.upload import Upload, blaming_disk
from gralora_runtime.errors import (
    AdapterUploadError,
    AdapterUploadQuotaError,
    ConfigError,
    DrainingError,
    GraloraError,
    InvalidRequestError,
)

log = logging.getLogger(__name__)

UNFINISHED = "tmp"
MANIFEST_FILE = "manifest.json"
RECORD_FILE = "record.json"
KEPT = 8  # accepted uploads of a name
OVERHEAD_BYTES = 16 << 10  # of a directory and its manifest, so that many small uploads have a limit, too
RETRY_AFTER_S = 10.0  # until one of those that are being sent may have come
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadLimits:
    """How much clients may leave here."""

    adapter_bytes: int = 4 << 30  # of one adapter
    total_bytes: int = 50 << 30  # of all, unfinished ones with all that they announced
    at_once: int = 4  # uploads that are being sent
    unfinished_age_s: float = 86_400.0  # since something last came; older ones are removed


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Of the room for all uploads, what those of some names may take together."""

    is_own: Callable[[str], bool]  # whether a name is one of them
    max_bytes: int
    refusal: Callable[[int, int], GraloraError]  # for so many bytes that are taken, and so many more that are wanted


@dataclass(frozen=True, slots=True)
class Taken:
    """The room that one directory counts for, and whose it is."""

    name: str
    num_bytes: int


class Uploads:
    """A source of adapters, and the folder behind it. Methods may be called from any thread; some wait for the disk."""

    uri = "uploads"
    follows = True

    def __init__(
        self,
        folder: Path,
        *,
        limits: UploadLimits,
        in_use: Callable[[Path], bool],
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`in_use`: whether the catalogue has a version that is read from there. It must not call back."""
        self.folder = folder.absolute()
        self._limits = limits
        self._in_use = in_use
        self._now_s = now_s
        self._lock = threading.Lock()
        self._closed = False
        self._active: dict[str, Upload] = {}  # by name: one at a time
        self._taken: dict[Path, Taken] = {}  # by each directory
        self._changed_s: dict[Path, float] = {}  # of unfinished ones
        self._records: dict[str, list[str]] = {}  # by name: digests of accepted uploads, the newest last
        # Whole when a server was killed that had not said whether they can be loaded.
        self._undecided: list[Path] = []
        self._unfinished = self.folder / UNFINISHED
        self._file_lock = self._open()
        self._recover()

    # A source.

    def find(self, name: str) -> Found | None:
        with self._lock:
            digests = self._records.get(name)
            return self._found(self._folder_of(name) / digests[-1]) if digests else None

    def locate(self, path: Path) -> Found | None:
        """Only the absolute path of a whole upload: relative ones mean the operator's own directories."""
        is_ours = path.parent.parent == self.folder and _DIGEST.fullmatch(path.parent.name)
        return self._found(path) if is_ours and _DIGEST.fullmatch(path.name) else None

    def names(self) -> Iterator[str]:
        with self._lock:
            return iter(tuple(self._records))

    def close(self) -> None:
        """Those that are being sent end where they are; nothing is written from then on."""
        with self._lock:
            self._closed = True
            active = tuple(self._active.values())
        for upload in active:
            upload.end(DrainingError())
        self._file_lock.release()

    # For clients.

    def received(self, manifest: Manifest) -> dict[str, int]:
        """How many bytes of each file are here, from its beginning."""
        with self._lock:
            if self._is_whole(manifest):
                return {file.name: file.size for file in manifest.files}
            staging = self._staging(manifest)
            return {file.name: _size(staging / file.name) for file in manifest.files}

    def begin(self, manifest: Manifest, share: Share | None = None) -> Upload:
        """Take what is sent from now on, behind what is here. Whoever was sending that name is sent away.

        `share`: bounds what is begun anew; None: only the room for all does.
        """
        upload = Upload(
            manifest,
            staging=self._staging(manifest),
            directory=self._directory(manifest),
            publish=self._publish,
            leave=self._leave,
        )
        with self._lock:
            self._refuse_when_closed()
            if manifest.name not in self._active and len(self._active) >= self._limits.at_once:
                problem = f"{self._limits.at_once} uploads are being sent already"
                raise AdapterUploadQuotaError(manifest.name, problem, RETRY_AFTER_S)
            before = self._active.get(manifest.name)
            self._active[manifest.name] = upload
        try:
            if before is not None:  # without the lock: it may be hashing
                before.end(AdapterUploadError(manifest.name, "gave way to a newer one of that name"))
            with self._lock, blaming_disk(manifest.name):
                self._refuse_when_closed()
                self._prepare(manifest, share)
        except BaseException:
            upload.close()
            raise
        return upload

    # For operators.

    def has(self, name: str) -> bool:
        """Whether something was uploaded under the name, and accepted."""
        with self._lock:
            return name in self._records

    def delete(self, name: str) -> None:
        """All that was uploaded under the name, or is being sent. Others get the room.

        Raises AdapterUploadError if the catalogue still reads from it: then all that is whole stays.
        """
        with self._lock:
            sent = self._active.get(name)
        if sent is not None:  # without the lock: it may be hashing
            sent.end(AdapterUploadError(name, "was deleted"))
        with self._lock, blaming_disk(name):
            self._refuse_when_closed()
            if self._active.get(name) not in (None, sent):
                raise AdapterUploadError(name, "is being sent again")
            folder = self._folder_of(name)
            entries = list(folder.iterdir()) if folder.is_dir() else []
            whole = [entry for entry in entries if entry.is_dir() and not entry.is_symlink()]
            if any(map(self._in_use, whole)):
                raise AdapterUploadError(name, "stays: an adapter is read from it")
            if name in self._records:
                (folder / RECORD_FILE).unlink(
                    missing_ok=True
                )  # first, so that a kill leaves nothing that would be found
                sync_directory(folder)
                del self._records[name]
            for directory in (*whole, *self._unfinished_of(name)):
                self._remove(directory)
            self._remove_if_empty(folder)
        log.info("what was uploaded as adapter %r is deleted", name)

    # For whoever tried to load what came.

    def accept(self, manifest: Manifest) -> None:
        """From now on the name is this upload."""
        with self._lock, blaming_disk(manifest.name):
            self._refuse_when_closed()
            digests = [digest for digest in self._records.get(manifest.name, ()) if digest != manifest.digest]
            self._write_record(manifest.name, [*digests, manifest.digest])
            self._prune(manifest.name, keep=KEPT)

    def reject(self, manifest: Manifest) -> None:
        """It cannot be loaded, and goes, unless it could be once."""
        directory = self._directory(manifest)
        with self._lock:
            if not (self._closed or self._is_kept(manifest)):
                self._remove(directory)
                self._remove_if_empty(directory.parent)

    def prune(self, names: Iterable[str]) -> None:
        """Of these names keep what was accepted last, and what the catalogue still has."""
        for name in names:
            with self._lock:
                if self._closed:
                    return
                if name in self._records:
                    self._prune(name, keep=1)

    def set_back(self, manifest: Manifest) -> None:
        """Nobody could say whether it can be loaded: as if its last byte had not come."""
        directory = self._directory(manifest)
        with self._lock:
            if not (self._closed or self._is_kept(manifest)) and directory.is_dir():
                self._return_to_unfinished(directory)
                self._remove_if_empty(directory.parent)

    def decide(self, loaded: Collection[Path], newest: Mapping[str, Path]) -> None:
        """At start, after a kill between an upload's load and the answer: what the catalogue remembers is so.

        What it had loaded is accepted, and what it saw last, by name, is the upload to serve. What was whole and is
        none of its versions is unfinished again: nobody knows whether it can be loaded.
        """
        with self._lock:
            for directory in self._undecided:
                manifest = _read_manifest(directory)
                if manifest is not None and directory in loaded and self._directory(manifest) == directory:
                    self._write_record(manifest.name, [*self._records.get(manifest.name, ()), manifest.digest])
                else:
                    self._return_to_unfinished(directory)
                    self._remove_if_empty(directory.parent)
            self._undecided.clear()
            for name, directory in newest.items():
                digests = self._records.get(name, [])
                if directory.parent == self._folder_of(name) and directory.name in digests[:-1]:
                    others = [digest for digest in digests if digest != directory.name]
                    self._write_record(name, [*others, directory.name])

    # Below: with the lock held, but for those that take it.

    def _found(self, directory: Path) -> Found | None:
        if not directory.is_dir():
            return None
        return Found(directory=directory, roots=(directory,), revision=directory.name)

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise DrainingError

    def _folder_of(self, name: str) -> Path:
        return self.folder / hashlib.sha256(name.encode()).hexdigest()

    def _directory(self, manifest: Manifest) -> Path:
        return self._folder_of(manifest.name) / manifest.digest

    def _staging(self, manifest: Manifest) -> Path:
        of_both = hashlib.sha256(f"{manifest.name}\0{manifest.digest}".encode())
        return self._unfinished / of_both.hexdigest()

    def _is_whole(self, manifest: Manifest) -> bool:
        """It was checked when it got its name; what was cut off since is seen."""
        directory = self._directory(manifest)
        return all(_size(directory / file.name) == file.size for file in manifest.files) and directory.is_dir()

    def _is_kept(self, manifest: Manifest) -> bool:
        accepted = manifest.digest in self._records.get(manifest.name, ())
        return accepted or self._in_use(self._directory(manifest))

    def _prepare(self, manifest: Manifest, share: Share | None) -> None:
        """A directory to receive it, within the limits."""
        self._remove_old()
        staging = self._staging(manifest)
        if self._is_whole(manifest):
            return
        if (directory := self._directory(manifest)).is_dir():  # somebody has damaged it: it is sent anew
            self._return_to_unfinished(directory)
        if staging not in self._taken:
            self._check_room(manifest)
            self._check_share(manifest, share)
            made = self._unfinished / f"new-{uuid.uuid4().hex}"
            try:
                made.mkdir()
                _write(made / MANIFEST_FILE, manifest.to_json())
                made.rename(staging)
            except OSError:
                shutil.rmtree(made, ignore_errors=True)
                raise
            self._taken[staging] = _counted(manifest)
        self._changed_s[staging] = self._now_s()

    def _check_room(self, manifest: Manifest) -> None:
        limits, wanted = self._limits, manifest.num_bytes
        if wanted > limits.adapter_bytes:
            raise AdapterUploadQuotaError(manifest.name, f"it has {wanted} bytes of at most {limits.adapter_bytes}")
        left = limits.total_bytes - sum(taken.num_bytes for taken in self._taken.values())
        if _counted(manifest).num_bytes > left:
            problem = f"of {limits.total_bytes} bytes for all uploads {max(left, 0)} are left"
            raise AdapterUploadQuotaError(manifest.name, problem)
        if shutil.disk_usage(self.folder).free < wanted:
            raise AdapterUploadQuotaError(manifest.name, f"the disk has no {wanted} bytes left")

    def _check_share(self, manifest: Manifest, share: Share | None) -> None:
        if share is None:
            return
        own = sum(taken.num_bytes for taken in self._taken.values() if share.is_own(taken.name))
        wanted = _counted(manifest).num_bytes
        if own + wanted > share.max_bytes:
            raise share.refusal(own, wanted)

    def _remove_old(self) -> None:
        active = {self._staging(upload.manifest) for upload in self._active.values()}
        oldest_s = self._now_s() - self._limits.unfinished_age_s
        for staging, changed_s in tuple(self._changed_s.items()):
            if changed_s < oldest_s and staging not in active:
                log.info("%s is removed: nothing came for %g s", staging, self._limits.unfinished_age_s)
                self._remove(staging)

    def _unfinished_of(self, name: str) -> list[Path]:
        found = [(staging, _read_manifest(staging)) for staging in self._changed_s]
        return [staging for staging, manifest in found if manifest is not None and manifest.name == name]

    def _publish(self, manifest: Manifest) -> None:
        """All of it is here and checked. Takes the lock."""
        staging, directory = self._staging(manifest), self._directory(manifest)
        with self._lock:
            directory.parent.mkdir(exist_ok=True)
            staging.rename(directory)
            for parent in (directory.parent, self.folder, self._unfinished):
                sync_directory(parent)
            self._taken[directory] = self._taken.pop(staging)
            del self._changed_s[staging]
        log.info("adapter %r was uploaded to %s", manifest.name, directory)

    def _leave(self, upload: Upload) -> None:
        """Nothing more comes by this call. Takes the lock."""
        staging = self._staging(upload.manifest)
        with self._lock:
            if self._active.get(upload.manifest.name) is upload:
                del self._active[upload.manifest.name]
            if staging in self._changed_s:
                self._changed_s[staging] = self._now_s()

    def _write_record(self, name: str, digests: list[str]) -> None:
        folder, written = self._folder_of(name), self._unfinished / f"record-{uuid.uuid4().hex}"
        try:
            _write(written, json.dumps({"name": name, "digests": digests}))
            written.replace(folder / RECORD_FILE)
        finally:
            written.unlink(missing_ok=True)
        sync_directory(folder)
        self._records[name] = digests

    def _prune(self, name: str, *, keep: int) -> None:
        """All but the newest go, except for those that the catalogue still has."""
        folder, digests = self._folder_of(name), self._records[name]
        spare = [digest for digest in digests[:-keep] if not self._in_use(folder / digest)]
        if spare:
            self._write_record(name, [digest for digest in digests if digest not in spare])
        for digest in spare:
            self._remove(folder / digest)

    def _remove(self, directory: Path) -> None:
        self._taken.pop(directory, None)
        self._changed_s.pop(directory, None)
        if directory.is_dir():
            removed = self._unfinished / f"removed-{uuid.uuid4().hex}"
            directory.rename(removed)  # first, so that nobody finds half of it
            shutil.rmtree(removed)

    @staticmethod
    def _remove_if_empty(folder: Path) -> None:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def _return_to_unfinished(self, directory: Path) -> None:
        manifest = _read_manifest(directory)
        if manifest is None or self._directory(manifest) != directory or self._staging(manifest).exists():
            self._remove(directory)
            return
        self._taken.pop(directory, None)
        directory.rename(self._staging(manifest))
        self._note_unfinished(manifest)

    def _note_unfinished(self, manifest: Manifest) -> None:
        staging = self._staging(manifest)
        self._taken[staging] = _counted(manifest)
        self._changed_s[staging] = max(file.stat().st_mtime for file in staging.iterdir())

    # At start, when nobody else is here.

    def _open(self) -> FileLock:
        try:
            self._unfinished.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock", thread_local=False)  # whichever thread closes
            lock.acquire(timeout=0)
        except Timeout as cause:
            raise ConfigError(f"{self.folder}: another server keeps its uploads here") from cause
        except OSError as cause:
            raise ConfigError(f"{self.folder}: uploads cannot be kept here ({cause.strerror})") from cause
        return lock

    def _recover(self) -> None:
        """What a server left that was killed: uploads can go on, everything else that is unfinished goes."""
        for entry in tuple(self._unfinished.iterdir()):
            manifest = _read_manifest(entry)
            if manifest is not None and self._staging(manifest) == entry:
                self._note_unfinished(manifest)
            elif entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        for folder in tuple(self.folder.iterdir()):
            if _DIGEST.fullmatch(folder.name) and folder.is_dir():
                self._recover_name(folder)
        self._remove_old()

    def _recover_name(self, folder: Path) -> None:
        name, digests = _read_record(folder)
        is_sound = self._folder_of(name) == folder
        whole = [digest for digest in digests if is_sound and (folder / digest).is_dir()]
        undecided = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name not in whole]
        if not whole and not undecided:
            shutil.rmtree(folder)
            return
        self._undecided += undecided
        if whole:
            self._records[name] = whole
        for directory in (*undecided, *(folder / digest for digest in whole)):
            manifest = _read_manifest(directory)
            self._taken[directory] = Taken(name, OVERHEAD_BYTES) if manifest is None else _counted(manifest)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def _counted(manifest: Manifest) -> Taken:
    return Taken(manifest.name, manifest.num_bytes + OVERHEAD_BYTES)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read_manifest(directory: Path) -> Manifest | None:
    """None: it has none that can be read, so it is no upload of ours."""
    try:
        return Manifest.from_json((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, InvalidRequestError):
        return None


def _read_record(folder: Path) -> tuple[str, list[str]]:
    """The name and its accepted uploads; "" and none where the first one was not accepted yet."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        return str(record["name"]), [str(digest) for digest in record["digests"] if _DIGEST.fullmatch(str(digest))]
    except (OSError, ValueError, KeyError, TypeError):
        return "", []
