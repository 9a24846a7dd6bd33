"""What outlives the server: the catalogue's journal, and copies of what directories held. Nothing, without a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from gralora_runtime.adapters.catalogue.content import ContentStore
from gralora_runtime.adapters.catalogue.journal import Journal, NameRow, VersionRow
from gralora_runtime.adapters.catalogue.recorder import Recorder
from gralora_runtime.adapters.catalogue.store import AdapterStore, AdapterVersion, Alias, Canary
from gralora_runtime.errors import CatalogueError

Roots = tuple[Path, ...]


class Persistence:
    """Everything that may wait for a disk happens in other threads, or in `flush`."""

    def __init__(self, folder: Path | None, *, copies_bytes: int, store: AdapterStore) -> None:
        """Raises CatalogueError for a catalogue that cannot be trusted."""
        self._folder = None if folder is None else folder.absolute()
        self._store = store
        self._rows: tuple[NameRow, ...] = ()
        self._recorder: Recorder | None = None
        self._copies: ContentStore | None = None
        if self._folder is not None:
            journal = Journal.open(self._folder)
            self._rows = journal.names()
            self._recorder = Recorder(journal)
            self._copies = ContentStore(self._folder / "versions", budget_bytes=copies_bytes, needed=self._is_last)
            known = {version.digest for row in self._rows for version in row.versions}
            self.drop_unused_copies(digest for digest in self._copies.digests() if digest not in known)

    def unloaded(self) -> Mapping[str, int]:
        """Names that an operator removed before the server ended, and the last number of each."""
        return {row.name: row.last_number for row in self._rows if row.unloaded}

    def departed(self) -> Mapping[str, int]:
        """Names that were given up because nothing was left of them, and the last number of each."""
        return {row.name: row.last_number for row in self._rows if not row.unloaded and row.current is None}

    def aliases(self, roots_of: Callable[[Path], Roots]) -> Iterator[Alias]:
        """Names and versions as they were. `roots_of`: where links in a directory may end."""
        for row in self._rows:
            if not row.unloaded and row.current is not None:
                yield self._alias(row, roots_of)

    def note(self, alias: Alias) -> None:
        """Something that is to be remembered is different now. A name that nobody has read is in its source."""
        if self._recorder is not None and (alias.is_known or alias.pinned):
            self._recorder.note(alias.name, _row(alias))

    def unload(self, alias: Alias) -> None:
        """An operator removed it: that is remembered, and the last number that it gave to a version."""
        if self._recorder is not None:
            self._recorder.note(alias.name, _row_without_versions(alias.name, alias.last_number, unloaded=True))

    def depart(self, name: str, last_number: int) -> None:
        """It is listed no more, and found again whenever it is somewhere. 0: none of its numbers meant a content."""
        if self._recorder is not None:
            row = _row_without_versions(name, last_number, unloaded=False) if last_number else None
            self._recorder.note(name, row)

    def used(self, version: AdapterVersion) -> None:
        if self._recorder is not None and version.digest:
            self._recorder.use(version.name, version.number, version.last_used_s)

    def keep_copy(self, version: AdapterVersion, done: Callable[[str, Path], None]) -> None:
        """Of what was just read, unless it lies where nobody overwrites it. `done` is called in another thread."""
        ours = self._folder is not None and version.source.is_relative_to(self._folder)
        if self._copies is not None and version.copy is None and not ours:
            self._copies.keep(version.digest, version.source, version.roots, version.stamp, done)

    def drop_copy(self, digest: str) -> None:
        if self._copies is not None:
            self._copies.remove(digest)

    def drop_unused_copies(self, digests: Iterable[str]) -> None:
        """Of these, what no version has any more when it is on the disk that none has."""
        if self._copies is not None:
            for digest in digests:
                self._copies.drop(digest, self._is_unused)

    def flush(self) -> None:
        """Return when all that was noted is on the disk, or raise CatalogueError."""
        if self._recorder is not None:
            self._recorder.flush()

    def close(self) -> None:
        if self._copies is not None:
            self._copies.close()
        if self._recorder is not None:
            self._recorder.close()

    def _is_unused(self, digest: str) -> bool:
        """In the content store's thread. A removal that cannot be written down is not done: a kill undoes it."""
        try:
            self.flush()
        except CatalogueError:
            return False
        return not self._store.sharing(digest)

    def _is_last(self, digest: str) -> bool:
        """No directory has this content any more: it is that of no name's source."""
        sharing = self._store.sharing(digest)
        aliases = [(version, self._store.alias_of(version)) for version in sharing]
        return bool(sharing) and all(alias is None or version.number != alias.in_source for version, alias in aliases)

    def _alias(self, row: NameRow, roots_of: Callable[[Path], Roots]) -> Alias:
        assert row.current is not None
        versions = {version.number: self._version(version, roots_of) for version in row.versions}
        return Alias(
            name=row.name,
            versions=versions,
            promoted=row.current,
            previous=row.previous or 0,
            newest=row.newest or max(versions),
            last_number=row.last_number,
            seen={directory: _stamp(stamp) for directory, stamp in json.loads(row.seen).items()},
            canary=None if row.canary is None else Canary(number=row.canary, share=row.canary_share),
            pinned=row.pinned,
        )

    def _version(self, row: VersionRow, roots_of: Callable[[Path], Roots]) -> AdapterVersion:
        source = Path(row.source)
        assert self._copies is not None
        return AdapterVersion(
            name=row.name,
            number=row.number,
            source=source,
            roots=roots_of(source),
            digest=row.digest,
            copy=self._copies.find(row.digest) if row.stored else None,
            created_s=row.created_s,
            pinned=row.pinned,
            last_used_s=row.last_used_s,
        )


def _row(alias: Alias) -> NameRow:
    return NameRow(
        name=alias.name,
        current=alias.promoted,
        previous=alias.previous or None,
        newest=alias.newest or None,
        last_number=alias.last_number,
        seen=json.dumps(alias.seen),
        canary=alias.canary.number if alias.canary else None,
        canary_share=alias.canary.share if alias.canary else 0.0,
        pinned=alias.pinned,
        unloaded=False,
        versions=tuple(
            VersionRow(
                name=version.name,
                number=version.number,
                digest=version.digest,
                source=str(version.source),
                stored=version.copy is not None,
                pinned=version.pinned,
                created_s=version.created_s,
                last_used_s=version.last_used_s,
                error=str(version.error) if version.error else "",
            )
            for version in alias.versions.values()
        ),
    )


def _row_without_versions(name: str, last_number: int, *, unloaded: bool) -> NameRow:
    return NameRow(
        name=name,
        current=None,
        previous=None,
        newest=None,
        last_number=last_number,
        seen="{}",
        canary=None,
        canary_share=0.0,
        pinned=False,
        unloaded=unloaded,
    )


def _stamp(read: list[list[int]] | None) -> object:
    """As `files_stamp` makes it: JSON has no tuples."""
    return None if read is None else tuple(map(tuple, read))
