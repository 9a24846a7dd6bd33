"""How names and new content come into the catalogue: at start, when a request asks, an operator loads, files change.

Sources are asked in their threads, changed files are read in a thread of its own, so that however much changes, the
mover's readers bring what requests wait for. What was found is entered with the manager's lock held.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Protocol

from gralora_runtime.adapters.answers import Answers
from gralora_runtime.adapters.catalogue.catalogue import Catalogue
from gralora_runtime.adapters.catalogue.names import split_revision
from gralora_runtime.adapters.catalogue.resolver import Resolved, Resolver
from gralora_runtime.adapters.catalogue.scan import Scan, Seen
from gralora_runtime.adapters.catalogue.similar import similar_name
from gralora_runtime.adapters.catalogue.sources.directory import DirectorySource
from gralora_runtime.adapters.catalogue.sources.source import Found, Source
from gralora_runtime.adapters.catalogue.store import GONE, AdapterStore, AdapterVersion, Alias, Waiter
from gralora_runtime.adapters.catalogue.uploads import Uploads
from gralora_runtime.adapters.catalogue.watcher import Watcher
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE, AdapterSummary, inspect
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter, check_invocation, check_width
from gralora_runtime.adapters.checkpoint.spec import ModuleShape, to_keep
from gralora_runtime.adapters.persistence import Persistence
from gralora_runtime.adapters.residency.mover import log_if_unexpected
from gralora_runtime.errors import (
    AdapterNotFoundError,
    AdapterRejectedError,
    AdapterVersionLostError,
    DrainingError,
    GraloraError,
    InvalidRequestError,
)

log = logging.getLogger(__name__)

AT_HAND = (DirectorySource, Uploads)  # sources that need no other machine to find a name


class Household(Protocol):
    """What the manager does with what was found. Called with its lock held."""

    def enter(self, version: AdapterVersion, waiter: Waiter, answers: Answers) -> object:
        """Serve the waiter, or let it wait for the version."""

    def bring(
        self, version: AdapterVersion, adapter: LoadedAdapter, waiters: Sequence[Waiter], answers: Answers
    ) -> None:
        """These weights were read for these waiters, if there are any."""

    def bring_idle(self, version: AdapterVersion, answers: Answers) -> bool:
        """Load it though nobody waits. False: there is no free room for that."""
        ...

    def capacity_problem(self, version: AdapterVersion) -> GraloraError | None:
        """Why the version would never fit into the pool as it is now, if it would not."""

    def settle(self, alias: Alias, answers: Answers) -> object:
        """What the name stands for may have changed."""

    def identified(self, version: AdapterVersion) -> None:
        """Its files were read: what it is, is known."""

    def holds(self, version: AdapterVersion) -> bool:
        """Its weights are in memory, or on their way there, or somebody waits for them."""
        ...

    def fail(self, version: AdapterVersion, error: BaseException, answers: Answers) -> None:
        """Nobody will get this version."""


class Discovery:
    """Finds, registers, and takes note. Knows when files changed, not where weights are."""

    def __init__(
        self,
        *,
        sources: Sequence[Source],
        store: AdapterStore,
        catalogue: Catalogue,
        answering: Callable[[], AbstractContextManager[Answers]],
        read: Callable[[AdapterVersion], LoadedAdapter],
        household: Household,
        persistence: Persistence,
        modules: Sequence[ModuleShape],
        max_width: int,
        allowed_keys: Collection[str],
        vocab_size: int,
        keeps_16_bit: bool,
        element_bytes: int,
        watch: str,
    ) -> None:
        """`watch`: see `EngineConfig`."""
        self._sources = tuple(sources)
        self._store = store
        self._catalogue = catalogue
        self._answering = answering
        self._read = read
        self._household = household
        self._persistence = persistence
        self._modules = tuple(modules)
        self._max_width = max_width
        self._allowed_keys = allowed_keys
        self._vocab_size = vocab_size
        self._keeps_16_bit = keeps_16_bit
        self._element_bytes = element_bytes
        # By an operator, so that no request brings them back; and the last number that each has given to a version.
        self._unloaded: dict[str, int] = {}
        self._departed: dict[str, int] = {}  # names of which nothing was left, and the same of each
        self._closed = False
        self._resolver = Resolver(self._sources, similar=self._similar)
        self._refresher = ThreadPoolExecutor(1, thread_name_prefix="adapter-refresh")
        self._scan = Scan(self._summarize, self._on_looked_into)
        directories = [source for source in self._sources if isinstance(source, DirectorySource)]
        # Before anything is looked at, so that no change falls between the two.
        self._watcher = (
            Watcher(directories, self.refresh, self._below, poll=watch == "poll")
            if directories and watch != "off"
            else None
        )

    def begin(self) -> None:
        """Register what was remembered and what sources can name at once.

        Headers are read beside serving, weights when somebody asks.
        """
        self._unloaded.update(self._persistence.unloaded())
        self._departed.update(self._persistence.departed())
        unseen: dict[str, Alias] = {}
        for remembered in self._persistence.aliases(self._roots_of):
            self._store.add(remembered)
            self._scan.add(remembered.current)
            unseen[remembered.name] = remembered
        for source in self._sources:
            if isinstance(source, Uploads):
                self._agree_with(source)
            for name in source.names():
                unseen.pop(name, None)
                alias = self._store.find(name)
                if alias is not None:
                    alias.follows = source.follows
                if alias is not None and isinstance(source, Uploads):
                    self._refresh_from(source, alias)
                elif alias is not None or not isinstance(source, AT_HAND):
                    self.refresh(name)  # beside serving: files may have changed, or come from another machine
                elif name not in self._unloaded and (found := source.find(name)) is not None:
                    with self._answering():
                        self._register(name, Resolved(source, found))
        for name, alias in unseen.items():
            if not _is_there(alias.latest.source) and self._is_at_hand(alias.latest.source):
                self.refresh(name)
        self._scan.wait()
        self._refresher.submit(self._warm_up).add_done_callback(_log_failure)

    def _warm_up(self) -> None:
        """Beside serving: what is pinned comes first, then what was used last before the server ended."""
        with self._answering() as answers:
            remembered = [version for version in self._store.versions() if version.digest]
            for alias in tuple(self._store.aliases()):
                if alias.pinned or any(version.pinned for version in alias.versions.values()):
                    self._household.settle(alias, answers)
            remembered.sort(key=lambda version: (not self._store.pinned(version.digest), -version.last_used_s))
        for version in remembered:
            try:
                version.summary = version.summary or self._summarize(version)
            except AdapterRejectedError as error:
                log.warning("%s", error)
                continue
            with self._answering() as answers:
                if self._closed or not self._household.bring_idle(version, answers):
                    return

    def request(self, name: str, key: str, waiter: Waiter) -> None:
        """Somebody wants a name that the catalogue does not have. Without the lock."""
        if name in self._unloaded or not self._sources:
            waiter.future.set_exception(AdapterNotFoundError(name))
            return
        self._resolver.resolve(name).add_done_callback(partial(self._on_requested, name, key, waiter))

    def find_again(self, version: AdapterVersion, waiter: Waiter) -> None:
        """What it was to be read from is gone: a copy or a download that made room for others. Without the lock."""
        resolving = self._resolver.resolve(version.name)
        resolving.add_done_callback(partial(self._on_found_once_more, version, waiter))

    def load(self, name: str, path: Path | None, waiter: Waiter) -> None:
        """An operator wants the files to be read, whatever is known of the name. Without the lock."""
        if path is not None or not self._sources:
            self._load_from(name, self._locate(path or Path(name)), waiter)
            return
        self._resolver.appeared(name)
        self._resolver.resolve(name).add_done_callback(partial(self._on_found_to_load, name, waiter))

    def refresh(self, name: str) -> None:
        """Files of this name came or changed. Without the lock; what follows is not waited for."""
        self._resolver.appeared(name)
        with self._answering():
            alias = self._store.find(name)
            if self._closed or name in self._unloaded:
                return
            if alias is not None and alias.refreshing:
                alias.again = True
                return
            if alias is not None:
                alias.refreshing = True
        self._resolver.resolve(name).add_done_callback(partial(self._on_found_again, name))

    def _agree_with(self, uploads: Uploads) -> None:
        aliases = [alias for alias in self._store.aliases() if alias.newest in alias.versions]
        newest = {alias.name: alias.versions[alias.newest].source for alias in aliases}
        uploads.decide({version.source for version in self._store.versions()}, newest)

    def _refresh_from(self, source: Uploads, alias: Alias) -> None:
        """At once, so that an upload which a killed server accepted is read before any that comes now."""
        found, resolved = source.find(alias.name), Future[Resolved]()
        if found is not None:
            resolved.set_result(Resolved(source, found))
            alias.refreshing = True
            self._on_found_again(alias.name, resolved)

    def give_up_if_nothing_is_left(self, alias: Alias) -> None:
        """What a name whose files are gone was served from may have gone since. Without the lock."""
        with self._answering():
            if self._store.find(alias.name) is not alias or self._is_kept(alias):
                return
            places = _places(alias)
        if not any(map(_is_there, places)):
            self.refresh(alias.name)  # which asks the sources once more

    def leave(self, alias: Alias, answers: Answers) -> None:
        """It is listed no more, until it is found again. With the lock held."""
        self._catalogue.remove(alias)
        if alias.last_read:
            self._departed[alias.name] = alias.last_read
        self._persistence.depart(alias.name, alias.last_read)
        self._household.settle(alias, answers)

    def forget(self, alias: Alias) -> None:
        """An operator unloads it. With the lock held."""
        self._catalogue.remove(alias)
        self._unloaded[alias.name] = alias.last_number
        self._persistence.unload(alias)

    def take_back(self, alias: Alias, answers: Answers) -> None:
        """The load that brought the name has failed: it is gone, or unloaded, as it was before. With the lock held."""
        if alias.was_unloaded:
            self.forget(alias)
            self._household.settle(alias, answers)
        else:
            self.leave(alias, answers)

    def on_files_changed(self, version: AdapterVersion, adapter: LoadedAdapter, answers: Answers) -> None:
        """A version was to be read again, and its files have become another one. With the lock held.

        Who asked for the name gets that, if the name stands for it now; who asked for the version hears of its end.
        """
        alias = self._store.get(version.name)
        if version.copy is not None:
            problem = "the copy that was kept is damaged"
            log.error("%s: %s", version.label, problem)
            self._persistence.drop_copy(version.digest)
            version.copy = None
            self._household.fail(version, AdapterVersionLostError(version.name, version.number, problem), answers)
            return
        found = Found(directory=version.source, roots=version.roots, revision="")
        newest = alias.versions.get(alias.newest)  # None: an operator removed it, and no request brings it back
        is_source = newest is not None and version.source == newest.source
        now = self._take_note(alias, adapter, found, is_source=is_source)
        if not now.untried:
            alias.note_seen(version.source, version.stamp)
        comes_next = now.number in (alias.promoted, alias.on_trial)
        moved = [w for w in version.waiters if comes_next and not (w.reference and w.reference.is_exact)]
        version.waiters = [waiter for waiter in version.waiters if waiter not in moved]
        problem = f"its files have other content since (version {now.number})"
        self._household.fail(version, AdapterVersionLostError(version.name, version.number, problem), answers)
        self._household.bring(now, adapter, moved, answers)
        self._household.settle(alias, answers)

    def stop(self) -> None:
        """Begin nothing more. With the lock held; `close` afterwards."""
        self._closed = True
        self._scan.stop()

    def close(self) -> None:
        """Answer everybody, and wait for the threads."""
        if self._watcher is not None:
            self._watcher.close()
        self._resolver.close()
        self._refresher.shutdown(cancel_futures=True)

    def _enter(self, name: str, resolved: Resolved, *, provisional: bool = False) -> Alias:
        """Its numbers go on where an earlier life of the name ended."""
        return self._catalogue.register(
            name,
            resolved.found,
            follows=resolved.source.follows,
            provisional=provisional,
            last_number=self._departed.pop(name, 0),
        )

    def _register(self, name: str, resolved: Resolved) -> None:
        self._scan.add(self._enter(name, resolved).current)

    def _register_new(self, name: str, resolved: Resolved) -> None:
        """A directory that was made a moment ago may become an adapter, or an organisation's."""
        if (resolved.found.directory / CONFIG_FILE).exists():
            self._register(name, resolved)

    def _roots_of(self, directory: Path) -> tuple[Path, ...]:
        """Where links in it may end: where its source says, or else in itself."""
        for source in self._sources:
            if (found := source.locate(directory)) is not None:
                return found.roots
        return (directory,)

    def _locate(self, path: Path) -> Resolved:
        """The directory that an operator names: where a source keeps adapters, and nowhere else."""
        for source in self._sources:
            if (found := source.locate(path)) is not None:
                return Resolved(source, found)
        problem = "leaves the adapters directory" if self._sources else "the server was started without adapters"
        raise InvalidRequestError("path", str(path), problem)

    def _on_requested(self, name: str, key: str, waiter: Waiter, resolving: Future[Resolved]) -> None:
        """Somebody else may have registered the name meanwhile, or unloaded it."""
        with self._answering() as answers:
            try:
                alias = self._alias_for(name, resolving)
                assert waiter.reference is not None
                version = alias.select(waiter.reference, key)
            except BaseException as error:
                answers.error(waiter.future, error)
                return
            if not waiter.future.cancelled():
                self._household.enter(version, waiter, answers)

    def _on_found_once_more(self, version: AdapterVersion, waiter: Waiter, resolving: Future[Resolved]) -> None:
        with self._answering() as answers:
            alias = self._store.alias_of(version)
            error = DrainingError() if self._closed else resolving.exception()
            is_absent = isinstance(error, AdapterNotFoundError)
            if alias is None or is_absent or version.number != alias.in_source:
                answers.error(waiter.future, AdapterVersionLostError(version.name, version.number, GONE))
                if alias is not None and is_absent:
                    self._note_absence(alias, answers)
                return
            if error is not None:
                answers.error(waiter.future, error)
                return
            found = resolving.result().found
            version.source, version.roots, version.copy = found.directory, found.roots, None
            self._catalogue.note_gone(alias, False)
            if not waiter.future.cancelled():
                self._household.enter(version, waiter, answers)

    def _alias_for(self, name: str, resolving: Future[Resolved]) -> Alias:
        resolved = resolving.result()
        if self._closed:
            raise DrainingError
        if name in self._unloaded:
            raise AdapterNotFoundError(name)
        alias = self._store.find(name)
        return alias or self._enter(name, resolved)

    def _on_found_to_load(self, name: str, waiter: Waiter, resolving: Future[Resolved]) -> None:
        if (error := resolving.exception()) is None:
            self._load_from(name, resolving.result(), waiter)
        elif waiter.future.set_running_or_notify_cancel():
            waiter.future.set_exception(error)

    def _load_from(self, name: str, resolved: Resolved, waiter: Waiter) -> None:
        found = resolved.found
        with self._answering() as answers:
            if self._closed:
                answers.error(waiter.future, DrainingError())
                return
            last_number = self._unloaded.pop(name, 0)
            if last_number:
                self._departed[name] = last_number
            alias = self._store.find(name)
            if alias is not None:
                alias.current.quarantine.end()
            if alias is None:
                alias = self._enter(name, resolved, provisional=True)
                alias.was_unloaded = last_number > 0
                self._household.enter(alias.current, waiter, answers)
            elif not alias.is_known and found.directory == alias.current.source:
                self._point(alias.current, found)
                self._household.enter(alias.current, waiter, answers)
            else:  # read apart, so that the name stays what it is if these files are refused
                alias.refreshing = True
                self._read_anew(alias, found, waiter, answers)

    def _on_found_again(self, name: str, resolving: Future[Resolved]) -> None:
        """Of a name that nobody has read yet only the headers are looked at anew."""
        error = resolving.exception()
        with self._answering() as answers:
            alias = self._store.find(name)
            if alias is None:
                if error is None and not self._closed and name not in self._unloaded:
                    self._register_new(name, resolving.result())
                return
            if isinstance(error, AdapterNotFoundError) and not self._closed:
                self._end_refresh(alias, answers)
                self._note_absence(alias, answers)
                return
            found = None if error else resolving.result().found
            if found is not None:
                self._catalogue.note_gone(alias, False)
            if found is None or self._closed or alias.has_seen(found.directory):
                self._end_refresh(alias, answers)
            elif alias.is_known:
                self._read_anew(alias, found, None, answers)
            else:
                self._point(alias.current, found)
                self._scan.add(alias.current)
                self._end_refresh(alias, answers)

    def _note_absence(self, alias: Alias, answers: Answers) -> None:
        """No source has it. What was loaded from a path of its own has its files all the same."""
        if _is_there(alias.latest.source):
            self._catalogue.note_gone(alias, False)
        elif self._is_kept(alias) or any(map(_is_there, _places(alias))):
            self._catalogue.note_gone(alias, True)
        else:
            log.info("adapter %r is no longer listed: %s", alias.name, GONE)
            self.leave(alias, answers)

    def _is_kept(self, alias: Alias) -> bool:
        """It can be served from memory, or an operator wants to hear that it cannot: it is pinned."""
        held = any(version.pinned or self._household.holds(version) for version in alias.versions.values())
        return alias.pinned or held

    def _is_at_hand(self, directory: Path) -> bool:
        """Where it is, or was, tells that no other machine has to be asked whether it is still there."""
        local = [source for source in self._sources if isinstance(source, AT_HAND)]
        return len(local) == len(self._sources) or any(source.locate(directory) for source in local)

    def _below(self, beginnings: set[str]) -> tuple[str, ...]:
        """The names that are one of these, or an organisation's or a repository's that is."""
        with self._answering():
            names = tuple(self._store.names())
        return tuple(name for name in names if not beginnings.isdisjoint(_beginnings(name)))

    @staticmethod
    def _point(version: AdapterVersion, found: Found) -> None:
        """Nobody has read it yet: it is whatever lies there now."""
        version.source, version.roots = found.directory, found.roots
        if not version.loading:
            version.summary = version.error = None

    def _read_anew(self, alias: Alias, found: Found, waiter: Waiter | None, answers: Answers) -> None:
        files = AdapterVersion(name=alias.name, number=0, source=found.directory, roots=found.roots)

        def begin() -> None:
            reading = self._refresher.submit(self._read, files)
            reading.add_done_callback(partial(self._on_read_anew, alias, found, files, waiter))

        answers.later(begin)

    def _on_read_anew(
        self, alias: Alias, found: Found, files: AdapterVersion, waiter: Waiter | None, reading: Future[LoadedAdapter]
    ) -> None:
        if reading.cancelled():
            if waiter is not None:
                waiter.future.cancel()
            return
        error = reading.exception()
        log_if_unexpected(alias.name, error)
        with self._answering() as answers:
            self._end_refresh(alias, answers)
            if self._closed:
                error = DrainingError()
            elif self._store.find(alias.name) is not alias:
                error = AdapterNotFoundError(alias.name)
            elif error is None and not alias.is_known and alias.current.loading:
                again = partial(self._on_read_anew, alias, found, files, waiter, reading)
                self._after(alias.current, again, answers)
                return
            elif error is None and waiter is not None:
                error = self._capacity_problem(alias.name, reading.result(), found)
            elif error is not None and (waiter is None or found.directory == alias.current.source):
                alias.error = to_keep(error)
                alias.quarantine.extend()
                log.warning("the newest files of adapter %r are not served: %s", alias.name, error)
            if error is None:
                self._catalogue.note_gone(alias, False)
                version = self._take_note(alias, reading.result(), found)
                version.stamp = files.stamp
                self._household.identified(version)
                self._household.bring(version, reading.result(), [waiter] if waiter else [], answers)
                self._household.settle(alias, answers)
            elif waiter is not None:
                answers.error(waiter.future, error)

    def _after(self, version: AdapterVersion, call: Callable[[], object], answers: Answers) -> None:
        """It is being read for the first time. What it is has to be known before other files become the name's."""
        first = Waiter(future=Future(), wants_lease=False)
        first.future.add_done_callback(lambda _: call())
        self._household.enter(version, first, answers)

    def _capacity_problem(self, name: str, adapter: LoadedAdapter, found: Found) -> GraloraError | None:
        """What an operator wants to be loaded now is no version if that is impossible."""
        layout = adapter.layout
        version = AdapterVersion(
            name=name,
            number=0,
            source=found.directory,
            roots=found.roots,
            summary=layout.summary,
            digest=adapter.digest,
        )
        return self._household.capacity_problem(version)

    def _take_note(
        self, alias: Alias, adapter: LoadedAdapter, found: Found, *, is_source: bool = True
    ) -> AdapterVersion:
        version = self._catalogue.take_note(
            alias, adapter.digest, found, is_source=is_source, has_golden=adapter.has_golden
        )
        version.summary, version.error = adapter.layout.summary, None
        version.warn(adapter.warnings)
        return version

    def _end_refresh(self, alias: Alias, answers: Answers) -> None:
        alias.refreshing = False
        if alias.again:
            alias.again = False
            answers.later(partial(self.refresh, alias.name))

    def _similar(self, name: str) -> str:
        with self._answering():
            names = tuple(self._store.names())
        return similar_name(name, names)

    def _summarize(self, version: AdapterVersion) -> AdapterSummary:
        directory, roots = version.place
        header = inspect(directory, name=version.name, roots=roots, allowed_keys=self._allowed_keys)
        header.fitting_plan(self._modules)
        summary = header.summary(self._modules, keeps_16_bit=self._keeps_16_bit, element_bytes=self._element_bytes)
        check_width(version.name, summary.equivalent_rank, self._max_width)
        check_invocation(version.name, summary.invocation, self._vocab_size)
        return summary

    def _on_looked_into(self, version: AdapterVersion, seen: Seen) -> None:
        """In a thread of the scan. A request may have been faster, or an operator; what they found is newer."""
        with self._answering():
            if version.summary or version.error or version.loading or self._store.alias_of(version) is None:
                return
            if isinstance(seen, AdapterSummary):
                version.summary = seen
            else:
                version.error = seen


def _places(alias: Alias) -> tuple[Path, ...]:
    """Where one of its versions could be read from, if there still is something."""
    versions = alias.versions.values()
    return tuple(place for version in versions for place in (version.source, version.copy) if place is not None)


def _is_there(directory: Path) -> bool:
    """As far as anybody can say: a file system that does not answer has lost nothing yet."""
    try:
        return directory.is_dir()
    except OSError:
        return True


def _beginnings(name: str) -> tuple[str, ...]:
    """`acme/pirate@main`: itself, acme/pirate, acme."""
    bare, _ = split_revision(name)
    return (name, bare, bare.split("/")[0])


def _log_failure(done: Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        log.error("bringing adapters at start failed", exc_info=error)
