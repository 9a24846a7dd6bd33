"""Decides which version a name stands for: what becomes of new content, promotions, canaries, and what is kept.

Called with the manager's lock held. Moves no bytes and reads no files; whoever has to hear of a change is told by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gralora_runtime.adapters.catalogue.names import Reference
from gralora_runtime.adapters.catalogue.sources.source import Found
from gralora_runtime.adapters.catalogue.store import AdapterStore, AdapterVersion, Alias, Canary
from gralora_runtime.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Retention:
    """Which versions are kept beside the promoted one and the one before it."""

    max_versions: int = 8  # of a name
    max_age_s: float = 30 * 86_400  # since they were last used, or else made


RETENTION = Retention()


class Catalogue:
    """The store's rules. A version that is promoted, a canary, pinned or in use is never removed."""

    def __init__(
        self,
        store: AdapterStore,
        retention: Retention,
        changed: Callable[[Alias], None],
        removed: Callable[[AdapterVersion], None],
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`changed`: what is known of a name is different now. `removed`: a version is no longer listed."""
        self._store = store
        self._retention = retention
        self._changed = changed
        self._removed = removed
        self._now_s = now_s

    def register(
        self, name: str, found: Found, *, follows: bool, provisional: bool = False, last_number: int = 0
    ) -> Alias:
        """A new name, with one version that nobody has read yet. `last_number`: of an earlier life of the name."""
        number = last_number + 1
        version = AdapterVersion(
            name=name, number=number, source=found.directory, roots=found.roots, provisional=provisional
        )
        alias = Alias(
            name=name,
            follows=follows,
            versions={number: version},
            promoted=number,
            newest=number,
            last_number=number,
        )
        self._store.add(alias)
        self._changed(alias)
        return alias

    def take_note(
        self, alias: Alias, digest: str, found: Found, *, is_source: bool = True, has_golden: bool = False
    ) -> AdapterVersion:
        """The alias's source has this content now. Returns the version that it is, new or not.

        `has_golden`: it has to be tried first, and is the newest once it is admitted.

        `is_source` False: some other directory has it, that one of its versions was once read from. That promotes none.

        Content that differs from what the source had before is promoted, if the alias follows its source; so a name
        that was rolled back stays where it is until its files change again.
        """
        version = self._version_of(alias, digest, found)
        self._store.identify(version, digest)
        version.untried = has_golden and not version.admitted
        version.quarantine.end()
        alias.error = None
        if is_source:
            alias.on_trial = version.number if version.untried and version.number != alias.newest else 0
            if not version.untried:
                self._be_newest(alias, version)
        self.prune(alias)
        self._changed(alias)
        return version

    def admit(self, alias: Alias, version: AdapterVersion) -> None:
        """Its golden prompts are answered. It becomes the newest, if its source still has it."""
        version.untried, version.admitted = False, True
        version.quarantine.end()
        if alias.on_trial == version.number:
            alias.on_trial = 0
            self._be_newest(alias, version)
        self.prune(alias)
        self._changed(alias)

    def refuse(self, alias: Alias, version: AdapterVersion, error: BaseException) -> None:
        """They are not. What the name stands for stays as it is."""
        version.quarantine.extend()
        if alias.on_trial == version.number:
            alias.error = error
            alias.quarantine.extend()
        self._changed(alias)

    def promote(self, alias: Alias, reference: Reference) -> AdapterVersion:
        """Let the name stand for a version. Raises AdapterVersionNotFoundError."""
        version = alias.select(reference, "")
        _refuse_untried(version)
        if version.number != alias.promoted:
            self._stand_for(alias, version.number)
            self.prune(alias)
            self._changed(alias)
        return version

    def roll_back(self, alias: Alias) -> AdapterVersion:
        """Let the name stand for what it stood for before. Twice is back again. Raises InvalidRequestError."""
        if alias.previous not in alias.versions:
            raise InvalidRequestError("name", alias.name, "there is no earlier version to roll back to")
        self._stand_for(alias, alias.previous)
        self._changed(alias)
        return alias.current

    def set_canary(self, alias: Alias, reference: Reference, share: float) -> AdapterVersion | None:
        """Give a version a share of the name's requests; 0 ends that. Raises AdapterVersionNotFoundError."""
        if not 0.0 <= share <= 1.0:
            raise InvalidRequestError("share", share, "must be from 0 to 1")
        if share == 0.0:
            alias.canary = None
            self._changed(alias)
            return None
        version = alias.select(reference, "")
        if version.number == alias.promoted:
            raise InvalidRequestError("version", version.label, "is promoted already, so it cannot be a canary")
        _refuse_untried(version)
        alias.canary = Canary(number=version.number, share=share)
        self._changed(alias)
        return version

    def remove_version(self, alias: Alias, version: AdapterVersion) -> None:
        self._store.remove_version(alias, version)
        if alias.previous == version.number:
            alias.previous = 0
        if alias.newest == version.number:
            alias.newest = 0
        if alias.on_trial == version.number:
            alias.on_trial = 0
        if alias.canary is not None and alias.canary.number == version.number:
            alias.canary = None
        self._removed(version)
        self._changed(alias)

    def remove(self, alias: Alias) -> None:
        """The name and all its versions."""
        self._store.remove(alias)
        self._changed(alias)
        for version in alias.versions.values():
            self._removed(version)

    def note_gone(self, alias: Alias, gone: bool) -> None:
        """Whether no source has the alias any more."""
        if alias.gone != gone:
            alias.gone = gone
            self._changed(alias)

    def prune(self, alias: Alias) -> None:
        """Versions that are too many or too old go. Called when a name changes, and now and then."""
        spare = list(self._spare(alias))  # the oldest first
        too_many = len(alias.versions) - self._retention.max_versions
        oldest_s = self._now_s() - self._retention.max_age_s
        for position, version in enumerate(spare):
            if position < too_many or max(version.last_used_s, version.created_s) < oldest_s:
                self.remove_version(alias, version)

    def _version_of(self, alias: Alias, digest: str, found: Found) -> AdapterVersion:
        same = next((v for v in alias.versions.values() if v.digest == digest), None)
        unread = next((v for v in alias.versions.values() if v.digest == "" and v.number == alias.newest), None)
        version = same or unread
        if version is None:
            version = AdapterVersion(
                name=alias.name,
                number=alias.last_number + 1,
                source=found.directory,
                roots=found.roots,
                created_s=self._now_s(),
            )
            alias.last_number = version.number
            self._store.add_version(alias, version)
        version.source, version.roots = found.directory, found.roots
        return version

    def _be_newest(self, alias: Alias, version: AdapterVersion) -> None:
        alias.quarantine.end()
        if version.number != alias.newest:
            alias.newest = version.number
            if alias.follows:
                self._stand_for(alias, version.number)

    @staticmethod
    def _stand_for(alias: Alias, number: int) -> None:
        if number == alias.promoted:
            return
        alias.previous, alias.promoted = alias.promoted, number
        if alias.canary is not None and alias.canary.number == number:
            alias.canary = None

    @staticmethod
    def _spare(alias: Alias) -> Iterator[AdapterVersion]:
        canary = alias.canary.number if alias.canary else 0
        kept = {alias.promoted, alias.previous, alias.newest, alias.on_trial, canary}
        for number, version in alias.versions.items():
            if number not in kept and not (version.pinned or version.in_flight or version.loading):
                yield version


def _refuse_untried(version: AdapterVersion) -> None:
    """What is not read yet is tried when it is."""
    if version.untried:
        why = f"has not answered its golden prompts: {version.error}" if version.error else "is being tried"
        raise InvalidRequestError("version", version.label, why)
