"""Everything that may happen to adapters, in any order, against a model that is a few dictionaries.

After each step the books add up, and whatever was served is what the model says: this content, under this version. A
crash leaves what was answered before it, and nothing of what was not whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
from adapters.harness import WAIT_S, manager_of, quiesce, until
from adapters.test_versions import digest_of, write_version
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.checkpoints import edit_config
from support.litter import litter
from support.name_model import NameModel
from support.thorough import MANY
from support.uploading import CONFIG, WEIGHTS, manifest_of

from gralora_runtime.adapters.catalogue import uploads as uploads_module
from gralora_runtime.adapters.catalogue.catalogue import Retention
from gralora_runtime.adapters.catalogue.database import FILE, LOCK
from gralora_runtime.adapters.catalogue.manifest import Manifest
from gralora_runtime.adapters.catalogue.sources.directory import DirectorySource
from gralora_runtime.adapters.catalogue.upload import Upload
from gralora_runtime.adapters.catalogue.uploads import OVERHEAD_BYTES, RECORD_FILE, UploadLimits, Uploads
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.errors import (
    AdapterBusyError,
    AdapterCapacityError,
    AdapterError,
    AdapterNotFoundError,
    AdapterRejectedError,
    AdapterUploadError,
    AdapterUploadQuotaError,
    AdapterVersionLostError,
    AdapterVersionNotFoundError,
    InvalidRequestError,
)
from gralora_server.uploading import Uploading

NAMES = ("a", "b", "acme/c", "d")
CONTENTS = range(6)
MAX_VERSIONS = 4
KEPT = 2  # uploads of a name, so that some go
AT_ONCE = 3
DAY_S = 86_400.0
# Before what of an upload the server dies.
UNWRITTEN = " unwritten"  # and the journal has taken nothing by then
AFTERWARDS = "the moment that it has answered"
DEATHS = ("", "", "", "load", "accept", f"accept{UNWRITTEN}", "flush", f"flush{UNWRITTEN}", AFTERWARDS)
name_of, content_of = st.sampled_from(NAMES), st.sampled_from(CONTENTS)
is_broken = st.sampled_from([False, False, True])
AMONG_VERSIONS = ("promote", "roll_back", "try_a_canary")
ANSWERED = (*AMONG_VERSIONS, "pin", "unload")
number_of, share_of = st.integers(1, 4), st.sampled_from([0.0, 0.5, 1.0])


@cache
def trained(content: int) -> SimpleNamespace:
    """As a client has it: its digest, its files, and the room that it takes as an upload."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_version(Path(folder) / "trained", "x", content)
        digest = digest_of(path)
        files = {file: (path / file).read_bytes() for file in (CONFIG, WEIGHTS)}
        edit_config(path, gralora_k=3)
        broken = {CONFIG: (path / CONFIG).read_bytes(), WEIGHTS: files[WEIGHTS]}
    return SimpleNamespace(digest=digest, files=files, broken=broken)


NUM_BYTES = sum(map(len, trained(0).files.values())) + OVERHEAD_BYTES
LIMITS = UploadLimits(total_bytes=12 * NUM_BYTES + NUM_BYTES // 2, at_once=AT_ONCE)


class Sending:
    """One upload that a client is sending."""

    def __init__(self, upload: Upload, files: dict[str, bytes]) -> None:
        self.upload, self.files = upload, files
        self.manifest = upload.manifest


class Told:
    """A manager that says what a server is about to ask of it."""

    def __init__(self, inner: Any, about_to: Callable[[str], None]) -> None:
        self._inner, self._about_to = inner, about_to

    @property
    def uploads(self) -> Told:
        return Told(self._inner.uploads, self._about_to)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self._about_to(name)
            return getattr(self._inner, name)(*arguments, **options)

        return call


def fits(known: NameModel, numbers: Sequence[int]) -> bool:
    """Whether these are the name's versions, but for some that were too many. What a start loads is not taken away, so
    which of those that may go went is the real one's to say."""
    pointed_at = {known.promoted, known.previous, known.newest, known.canary[0] if known.canary else 0}
    gone = known.versions.keys() - set(numbers)
    too_many = max(0, len(known.versions) - MAX_VERSIONS)
    return known.versions.keys() >= set(numbers) and len(gone) <= too_many and gone.isdisjoint(pointed_at)


class Machine(RuleBasedStateMachine):
    """Room for three of six contents, host memory for one, copies for all, and for a dozen uploads."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.root, self.state, self.left = (self.folder / each for each in ("adapters", "state", "left"))
        self.root.mkdir()
        self.known = {name: NameModel() for name in NAMES}
        self.answered = deepcopy(self.known)  # what a crash must leave
        self.meant: dict[tuple[str, int], str] = {}  # the digest of every number that was ever answered
        self.held: list[tuple[AdapterLease, str]] = []
        self.sending: dict[str, Sending] = {}  # by name
        self.unfinished: dict[Manifest, float] = {}  # when something last came for it
        self.accepted: dict[str, list[Manifest]] = {name: [] for name in NAMES}
        self.at_risk: set[tuple[str, int]] = set()  # no copy was made before a crash
        self.later_s = 0.0
        self.disk_moves = Event()  # is not set while a disk is stuck
        self.disk_moves.set()
        self.on_answer: Callable[[], None] = lambda: None
        self.kept = patch.object(uploads_module, "KEPT", KEPT)
        self.kept.start()
        self.open()

    def open(self) -> None:
        self.later_s = 0.0
        self.uploads = Uploads(
            self.state / "uploads",
            limits=LIMITS,
            in_use=lambda folder: self.manager.has_version_at(folder),  # noqa: PLW0108  # there is no manager yet
            now_s=lambda: time.time() + self.later_s,
        )
        self.manager: AdapterManager = manager_of(
            None,
            sources=[self.uploads, DirectorySource(self.root)],
            units=3,
            host_units=1,
            state_dir=self.state,
            retention=Retention(max_versions=MAX_VERSIONS),
        )

    def teardown(self) -> None:
        self.release_all()
        quiesce(self.manager)
        self.manager.check_integrity()
        self.manager.close()
        self.kept.stop()
        shutil.rmtree(self.folder)

    def release_all(self) -> None:
        for lease, _ in self.held:
            self.manager.release(lease)
        self.held.clear()

    @initialize()
    def one_name_has_a_history(self) -> None:
        self.files_change("a", 0)
        self.load("a")
        self.files_change("a", 1)

    # What happens.

    @rule(name=name_of, content=content_of)
    def files_change(self, name: str, content: int) -> None:
        """And the server hears of it, as from a watcher."""
        write_version(self.root, name, content)
        known = self.known[name]
        known.on_disk = content
        self.manager.refresh(name)
        self.settle()
        if known.promoted and not known.unloaded and known.uploaded is None:
            self.see(name, content)

    @rule(name=name_of)
    def files_go(self, name: str) -> None:
        """Of what was read there is a copy, on the disk by then; a name that nobody has read leaves the list."""
        self.adopt(name)
        self.manager.flush()
        alias, known = self.manager._store.find(name), self.known[name]
        if alias is not None and any(version.digest and version.copy is None for version in alias.versions.values()):
            return
        shutil.rmtree(self.root / name, ignore_errors=True)
        known.on_disk = None
        self.manager.refresh(name)
        self.settle()
        alias = self.manager._store.find(name)
        assert alias is None or known.uploaded is not None or (alias.is_known and alias.gone), name
        assert alias is not None or known.unloaded or not known.versions, name

    @rule(name=name_of)
    def load(self, name: str) -> None:
        known = self.known[name]
        loading = self.manager.load(name)
        self.settle()  # with its copy, or new files may be faster
        if not loading.done():
            self.release_all()  # it waits for room
        if known.source is None:
            with pytest.raises(AdapterNotFoundError):
                loading.result(WAIT_S)
            return
        try:
            loading.result(WAIT_S)
        except AdapterCapacityError:
            if not known.promoted or known.unloaded:  # a name that found no room is not kept
                self.adopt(name)
            self.note_failed_load(name)
            return
        known.unloaded = False
        self.see(name, known.source)
        self.adopt(name)

    @rule(name=name_of, key=st.sampled_from(["x", "y", "z"]), hold=st.booleans())
    def generate(self, name: str, key: str, hold: bool) -> None:
        known = self.known[name]
        try:
            lease = self.ask(name, key)
        except AdapterNotFoundError:
            assert known.unloaded or known.source is None, name
            return
        except AdapterCapacityError:
            return
        except AdapterVersionLostError:
            assert (name, known.promoted) in self.at_risk or known.canary, name
            return
        if lease is None:
            return
        assert not known.unloaded, f"{name} was unloaded"
        self.adopt(name)
        self.check(lease, name, key)
        if hold and len(self.held) < 3:
            self.held.append((lease, lease.digest))
        else:
            self.manager.release(lease)

    @rule(name=name_of, number=st.integers(1, 6))
    def generate_by_version(self, name: str, number: int) -> None:
        known = self.known[name]
        try:
            lease = self.ask(f"{name}@{number}", "")
        except AdapterVersionNotFoundError:
            assert number not in known.versions or known.unloaded, (name, number)
        except AdapterNotFoundError:
            assert known.unloaded or known.source is None, name
        except AdapterVersionLostError:
            assert (name, number) in self.at_risk
        except AdapterCapacityError:
            pass
        else:
            if lease is not None:
                self.adopt(name)
                assert (lease.version, lease.digest) == (number, trained(known.versions[number]).digest)
                self.manager.release(lease)

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 2))
    def finish(self, index: int) -> None:
        lease, _ = self.held.pop(index % len(self.held))
        self.manager.release(lease)

    @rule(name=name_of)
    def cancel(self, name: str) -> None:
        self.manager.abandon(self.manager.acquire(name))
        self.settle()
        self.adopt(name)

    @rule(name=name_of, number=st.integers(1, 6))
    def promote(self, name: str, number: int) -> None:
        known = self.known[name]
        if self.refused(lambda: self.manager.promote(name, str(number)), number in known.versions, name):
            return
        if number != known.promoted:
            known.stand_for(number)
            self.prune(name)
        self.note_answer()

    @rule(name=name_of)
    def roll_back(self, name: str) -> None:
        known = self.known[name]
        if self.refused(lambda: self.manager.roll_back(name), known.previous in known.versions, name):
            return
        known.stand_for(known.previous)
        self.note_answer()

    @rule(name=name_of, number=number_of, share=share_of)
    def try_a_canary(self, name: str, number: int, share: float) -> None:
        known = self.known[name]
        allowed = share == 0.0 or (number in known.versions and number != known.promoted)
        if self.refused(lambda: self.manager.set_canary(name, str(number), share), allowed, name):
            return
        known.canary = None if share == 0.0 else (number, share)
        self.note_answer()

    @rule(name=name_of, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        try:
            self.manager.pin(name, pinned)
        except (AdapterNotFoundError, AdapterCapacityError):
            pass
        else:
            self.on_answer()
            self.known[name].pinned = pinned
            self.note_answer()
        self.settle()
        self.adopt(name)

    @rule(name=name_of)
    def unload(self, name: str) -> None:
        known = self.known[name]
        alias = self.manager._store.find(name)
        try:
            self.manager.unload(name)
        except (AdapterNotFoundError, AdapterBusyError):
            return
        self.on_answer()
        assert alias is not None
        last = max(known.last, alias.last_number)  # one that nobody has read has a number, too
        self.known[name] = NameModel(on_disk=known.on_disk, uploaded=known.uploaded, unloaded=True, last=last)
        self.note_answer()

    @precondition(lambda self: not self.held)
    @rule()
    def restart(self) -> None:
        self.begin_again()
        self.adopt_all()

    # Uploads.

    @rule(name=name_of, content=content_of, broken=is_broken)
    def begin_upload(self, name: str, content: int, broken: bool) -> None:
        """Or go on with one. Whoever is sending that name is sent away."""
        files = trained(content).broken if broken else trained(content).files
        manifest = manifest_of(name, files)
        is_new = manifest not in self.unfinished and manifest not in self.accepted[name]
        too_many = name not in self.sending and len(self.sending) >= AT_ONCE
        old = self.sending.pop(name, None)
        if not too_many:
            self.forget_old({manifest} | {each.manifest for each in self.sending.values()})
            is_new = is_new or (manifest not in self.unfinished and manifest not in self.accepted[name])
        full = is_new and self.room_used() + NUM_BYTES > LIMITS.total_bytes
        try:
            upload = self.uploads.begin(manifest)
        except AdapterUploadQuotaError:
            assert too_many or full
        else:
            assert not too_many
            assert not full
            self.sending[name] = Sending(upload, files)
            if manifest not in self.accepted[name]:
                self.unfinished[manifest] = self.later_s
        if old is not None:
            with pytest.raises(AdapterUploadError, match="gave way"):
                old.upload.write(CONFIG, 0, b"")
            self.leave(old)

    @precondition(lambda self: self.sending)
    @rule(index=st.integers(0, AT_ONCE - 1), share=st.sampled_from([0.0, 0.5, 1.0]))
    def send(self, index: int, share: float) -> None:
        sending = self.nth_sending(index)
        received = self.uploads.received(sending.manifest)
        for file, data in sending.files.items():
            until_byte = received[file] + int((len(data) - received[file]) * share)
            sending.upload.write(file, received[file], data[received[file] : until_byte])

    @precondition(lambda self: self.sending)
    @rule(index=st.integers(0, AT_ONCE - 1))
    def break_off_upload(self, index: int) -> None:
        sending = self.nth_sending(index)
        before = self.uploads.received(sending.manifest)
        del self.sending[sending.manifest.name]
        self.leave(sending)
        assert self.uploads.received(sending.manifest) == before

    @precondition(lambda self: self.sending)
    @rule(index=st.integers(0, AT_ONCE - 1))
    def damage_upload(self, index: int) -> None:
        """What came is not what was announced: it is not found, and the damaged file has to come again."""
        sending = self.nth_sending(index)
        if sending.manifest in self.accepted[sending.manifest.name]:
            return
        self.send_rest(sending)
        sending.upload.write(WEIGHTS, 0, b"\0" * 16)
        with pytest.raises(AdapterUploadError, match="wrong"):
            sending.upload.finish()
        del self.sending[sending.manifest.name]
        self.leave(sending)
        assert self.uploads.received(sending.manifest)[WEIGHTS] == 0

    @rule(name=name_of, content=content_of, broken=is_broken, dies_before=st.sampled_from(DEATHS))
    def upload(self, name: str, content: int, broken: bool, dies_before: str) -> None:
        self.begin_upload(name, content, broken)
        if name in self.sending:
            self.finish_upload(list(self.sending).index(name), dies_before)

    @precondition(lambda self: self.sending)
    @rule(index=st.integers(0, AT_ONCE - 1), dies_before=st.sampled_from(DEATHS))
    def finish_upload(self, index: int, dies_before: str) -> None:
        """What the server does with the last byte, and whether it still lives when it would do this."""
        self.release_all()  # or it may wait for room
        sending = self.nth_sending(index)
        name = sending.manifest.name
        self.send_rest(sending)
        del self.sending[name]
        before, unfinished = deepcopy(self.known[name]), dict(self.unfinished)
        self.manager.flush()
        self.note_answer()

        found = self.uploads.find(name)

        def about_to(call: str) -> None:
            if call in ("load", "accept"):
                assert self.uploads.find(name) == found  # nobody comes upon it by its name
            if call == dies_before.removesuffix(UNWRITTEN):
                if is_written:
                    self.manager.flush()
                self.copy_disk()
                moves.set()

        is_written = not dies_before.endswith(UNWRITTEN)
        self.on_answer = self.copy_disk if dies_before == AFTERWARDS else lambda: None
        with self.slow_disk() if is_written else self.stuck_disk() as moves:
            error = self.load_upload(sending, about_to)
        self.on_answer = lambda: None
        if not self.left.exists():
            if error is None:
                self.note_answer()
            return
        self.unfinished = unfinished
        after = self.known[name]
        if dies_before in ("load", f"accept{UNWRITTEN}"):  # nobody knows that it can be loaded
            if sending.manifest not in self.accepted_before:
                self.unfinished.setdefault(sending.manifest, self.later_s)
            self.accepted[name] = self.accepted_before
            self.known[name] = before
        else:
            assert error is None
            self.unfinished.pop(sending.manifest, None)
            if is_written:
                self.answered[name] = deepcopy(after)
            else:
                self.forget_unwritten(name, before)
        self.begin_again(self.left)
        self.compare_with_answers()

    def forget_unwritten(self, name: str, before: NameModel) -> None:
        """An upload was accepted, and the catalogue has not heard of it: another one that it knows is the name's."""
        accepted = self.accepted[name]
        if before.versions and before.uploaded is not None:
            newest = manifest_of(name, trained(before.versions[before.newest]).files)
            self.accepted[name] = [each for each in accepted if each != newest] + [newest]
        self.known[name] = before

    @rule()
    def a_day_passes(self) -> None:
        self.later_s += 2 * DAY_S

    # Crashes.

    @rule()
    def crash(self) -> None:
        """At rest, but with nothing written down that nobody was promised."""
        self.copy_disk()
        self.begin_again(self.left)
        self.compare_with_answers()

    @rule(index=st.integers(0, 11), share=share_of, what=st.sampled_from(ANSWERED))
    def crash_after_answer(self, index: int, share: float, what: str) -> None:
        """The moment that it has answered, with a disk that takes its time."""
        many = [name for name in NAMES if len(self.known[name].versions) > 1]
        some = [name for name in NAMES if self.known[name].versions] or list(NAMES)
        name = (many or some)[index % len(many or some)] if what in AMONG_VERSIONS else some[index % len(some)]
        known = self.known[name]
        others = [number for number in known.versions if number != known.promoted] or [1]
        number = others[index % len(others)]
        arguments = {"promote": (number,), "try_a_canary": (number, share), "pin": (not known.pinned,)}.get(what, ())
        self.on_answer = self.copy_disk
        with self.slow_disk():
            getattr(self, what)(name, *arguments)
        self.on_answer = lambda: None
        if self.left.exists():
            self.begin_again(self.left)
            self.compare_with_answers()

    @rule(name=name_of, content=content_of)
    def crash_before_it_is_written(self, name: str, content: int) -> None:
        """New files were seen, and the disk has taken nothing of it."""
        self.manager.flush()
        self.note_answer()
        with self.stuck_disk():
            self.files_change(name, content)
            self.copy_disk()
        self.answered[name].on_disk = content
        self.known = deepcopy(self.answered)
        self.begin_again(self.left)
        self.compare_with_answers()

    # What must hold.

    @invariant()
    def the_books_add_up(self) -> None:
        self.manager.check_integrity()
        assert self.manager.stats().leases == len(self.held)

    @invariant()
    def what_streams_hold_does_not_change(self) -> None:
        for lease, digest in self.held:
            resident = self.manager.pool.find(digest)
            assert resident is not None
            assert (resident.slot, resident.generation) == (lease.slot, lease.generation)

    @invariant()
    def names_stand_for_what_they_should(self) -> None:
        for name, known in self.known.items():
            alias = self.manager._store.find(name)
            if known.unloaded or (known.source is None and not known.versions):
                assert alias is None, name
            elif known.versions:
                assert alias is not None, name
                found = {number: v.digest for number, v in alias.versions.items() if v.digest}
                expected = {number: trained(content).digest for number, content in known.versions.items()}
                assert found == expected, name
                canary = (alias.canary.number, alias.canary.share) if alias.canary else None
                assert (alias.promoted, alias.previous, alias.newest) == (known.promoted, known.previous, known.newest)
                assert (alias.pinned, canary) == (known.pinned, known.canary), name

    @invariant()
    def what_was_unloaded_is_known_to_be(self) -> None:
        """By whatever failed since, and by the number that its next version must be above."""
        unloaded = self.manager._discovery._unloaded
        assert unloaded.keys() == {name for name, known in self.known.items() if known.unloaded}
        assert all(number >= self.known[name].last for name, number in unloaded.items())

    @invariant()
    def a_number_never_means_two_contents(self) -> None:
        for alias in self.manager._store.aliases():
            for number, version in alias.versions.items():
                assert version.digest in ("", self.meant.get((alias.name, number), version.digest)), version.label

    @invariant()
    def uploads_are_whole_or_not_there(self) -> None:
        """Found, on the disk and counted: those that were accepted, and what may be gone on with."""
        whole = {}
        for name, accepted in self.accepted.items():
            found = self.uploads.find(name)
            assert (found.revision if found else None) == (accepted[-1].digest if accepted else None), name
            if accepted:
                whole[self.uploads._folder_of(name).name] = {each.digest for each in accepted}
        on_disk = {path.name: path for path in self.uploads.folder.iterdir()}
        assert on_disk.keys() == {*whole, ".lock", "tmp"}
        for folder, digests in whole.items():
            assert {path.name for path in on_disk[folder].iterdir()} == {*digests, RECORD_FILE}
        unfinished = {self.uploads._staging(manifest).name for manifest in self.unfinished}
        assert {path.name for path in on_disk["tmp"].iterdir()} == unfinished
        assert sum(taken.num_bytes for taken in self.uploads._taken.values()) == self.room_used()

    # The model.

    def settle(self) -> None:
        """Until nothing is being looked up, read, copied or moved. Copies wait for the disk, if they have to go."""
        quiesce(self.manager)
        resolver = self.manager._discovery._resolver
        until(lambda: not resolver._asked and not any(a.refreshing for a in tuple(self.manager._store.aliases())))
        quiesce(self.manager)
        copies = self.manager._persistence._copies
        assert copies is not None
        if self.disk_moves.is_set():
            copies._copying.submit(int).result(WAIT_S)

    def ask(self, adapter: str, key: str) -> AdapterLease | None:
        """None: pins and leases leave no room for it until one of them ends, so nobody waits."""
        acquired = self.manager.acquire(adapter, key)
        self.settle()
        if acquired.done():
            return acquired.result()
        self.manager.abandon(acquired)
        self.settle()
        return None

    def adopt(self, name: str) -> None:
        """What happened beside the model: a name that was found, and read or not."""
        alias, known = self.manager._store.find(name), self.known[name]
        if alias is not None and alias.is_known and not known.versions and not known.unloaded:
            assert known.source is not None
            known.last = alias.last_number
            known.versions = {known.last: known.source}
            known.promoted = known.newest = known.last

    def adopt_all(self) -> None:
        for name in NAMES:
            self.adopt(name)

    def see(self, name: str, content: int) -> None:
        self.known[name].see(content)
        self.prune(name)

    def prune(self, name: str) -> None:
        self.known[name].prune(MAX_VERSIONS, {lease.version for lease, _ in self.held if lease.name == name})

    def refused(self, call: Callable[[], object], allowed: bool, name: str) -> bool:
        try:
            call()
        except (AdapterError, InvalidRequestError):
            alias = self.manager._store.find(name)
            assert not allowed or alias is None or not alias.is_known, name
            return True
        self.on_answer()
        self.settle()
        self.adopt(name)
        assert allowed or not self.known[name].versions, name
        return not allowed

    def check(self, lease: AdapterLease, name: str, key: str) -> None:
        known = self.known[name]
        assert lease.name == name
        assert lease.digest == trained(known.versions[lease.version]).digest
        if known.canary is not None and known.canary[1] == 1.0:
            assert lease.version == known.canary[0] or (name, known.canary[0]) in self.at_risk, key
        elif known.canary is None:
            assert lease.version == known.promoted

    def note_failed_load(self, name: str) -> None:
        """It may have used a number up, and never gives one back."""
        known = self.known[name]
        if known.unloaded:
            last = self.manager._discovery._unloaded[name]
            assert last >= known.last, name
            known.last = last

    def note_answer(self) -> None:
        """All that happened until now is on the disk, because somebody was told so."""
        self.answered = deepcopy(self.known)
        for name, known in self.known.items():
            for number, content in known.versions.items():
                assert self.meant.setdefault((name, number), trained(content).digest) == trained(content).digest

    def nth_sending(self, index: int) -> Sending:
        return list(self.sending.values())[index % len(self.sending)]

    def send_rest(self, sending: Sending) -> None:
        for file, offset in self.uploads.received(sending.manifest).items():
            sending.upload.write(file, offset, sending.files[file][offset:])

    def leave(self, sending: Sending) -> None:
        sending.upload.close()
        if sending.manifest in self.unfinished:
            self.unfinished[sending.manifest] = self.later_s

    def load_upload(self, sending: Sending, about_to: Callable[[str], None]) -> Exception | None:
        """As the server does it. Why it was refused, if it was."""
        name, known = sending.manifest.name, self.known[sending.manifest.name]
        self.accepted_before = list(self.accepted[name])
        manager: Any = Told(self.manager, about_to)
        try:
            asyncio.run(Uploading()._load(sending.upload, manager, pin=False))
        except (AdapterRejectedError, AdapterCapacityError) as error:
            self.settle()
            self.unfinished.pop(sending.manifest, None)
            self.note_failed_load(name)
            return error
        self.on_answer()
        self.settle()
        self.unfinished.pop(sending.manifest, None)
        content = next(content for content in CONTENTS if trained(content).files == sending.files)
        known.uploaded, known.unloaded = content, False
        self.see(name, content)
        self.note_upload(sending.manifest)
        return None

    def note_upload(self, manifest: Manifest) -> None:
        accepted = [each for each in self.accepted[manifest.name] if each != manifest] + [manifest]
        spare = [each for each in accepted[:-KEPT] if not self.manager.has_version_at(self.uploads._directory(each))]
        self.accepted[manifest.name] = [each for each in accepted if each not in spare]

    def room_used(self) -> int:
        manifests = [*self.unfinished, *(each for accepted in self.accepted.values() for each in accepted)]
        return sum(manifest.num_bytes + OVERHEAD_BYTES for manifest in manifests)

    def forget_old(self, active: set[Manifest]) -> None:
        for manifest, changed_s in tuple(self.unfinished.items()):
            if self.later_s - changed_s > DAY_S and manifest not in active:
                del self.unfinished[manifest]

    # What a crash leaves.

    def copy_disk(self) -> None:
        """All of it as it is now, with the server at work. Between two transactions: those are SQLite's matter."""
        recorder = self.manager._persistence._recorder
        copies = self.manager._persistence._copies
        assert recorder is not None
        assert copies is not None
        with recorder._journal._lock, copies._lock:
            shutil.copytree(self.state, self.left)

    def begin_again(self, left: Path | None = None) -> None:
        """With the disk as the server leaves it that closes now, or as it was when it was killed."""
        self.release_all()
        self.sending.clear()
        self.manager.close()
        if left is not None:
            shutil.rmtree(self.state)
            litter(left)
            left.rename(self.state)
        self.unfinished = dict.fromkeys(self.unfinished, 0.0)
        self.open()
        self.settle()

    def compare_with_answers(self) -> None:
        """What was answered is there. What was not may be, but only as a whole."""
        for name in NAMES:
            self.known[name] = self.survivor(name)
        for name, number in self.manager._discovery._unloaded.items():  # what a failed load used up meant nothing
            assert number >= self.answered[name].last, name
            self.known[name].last = number
        self.adopt_all()
        self.manager.flush()
        self.note_answer()
        catalogue = {FILE, f"{FILE}-wal", f"{FILE}-shm", LOCK}
        assert {path.name for path in self.state.iterdir()} <= {*catalogue, "uploads", "versions"}
        assert not any((self.state / "versions" / "tmp").iterdir())
        for version in self.manager._store.versions():
            if version.digest and version.copy is None and not version.source.is_relative_to(self.uploads.folder):
                self.at_risk.add((version.name, version.number))

    def survivor(self, name: str) -> NameModel:
        """Of the two that the name may be after a crash, what it is."""
        alias, candidates = self.manager._store.find(name), []
        for candidate in (self.known[name], self.answered[name]):
            candidate.on_disk, candidate.uploaded = self.known[name].on_disk, self.uploaded(name)
            if candidate.versions and candidate.source is not None:
                candidate.see(candidate.source)
            candidates.append(candidate)
        numbers = [] if alias is None else [number for number, version in alias.versions.items() if version.digest]
        fitting = [each for each in candidates if fits(each, numbers)]
        assert fitting, (name, numbers, candidates)
        fitting[0].versions = {number: fitting[0].versions[number] for number in numbers}
        return fitting[0]

    def uploaded(self, name: str) -> int | None:
        accepted = self.accepted[name]
        return next((c for c in CONTENTS if accepted and manifest_of(name, trained(c).files) == accepted[-1]), None)

    @contextlib.contextmanager
    def slow_disk(self) -> Iterator[Event]:
        """Whoever does not wait for it is faster, unless its event is set."""
        moves = Event()
        with self.writing_after(partial(moves.wait, 0.02)):
            yield moves

    @contextlib.contextmanager
    def stuck_disk(self) -> Iterator[Event]:
        """Until its event is set."""
        self.disk_moves = moves = Event()
        with self.writing_after(partial(moves.wait, WAIT_S)):
            try:
                yield moves
            finally:
                moves.set()

    @contextlib.contextmanager
    def writing_after(self, wait: Callable[[], object]) -> Iterator[None]:
        recorder = self.manager._persistence._recorder
        assert recorder is not None
        write = recorder._write

        def later(rows: Any) -> None:
            wait()
            write(rows)

        with patch.object(recorder, "_write", later):
            yield


Machine.TestCase.settings = settings(
    max_examples=220 if MANY else 25,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=not MANY,
    phases=[Phase.generate],  # a failure that is made smaller takes minutes; its steps are printed as they are
    report_multiple_bugs=False,
)
TestMachine = Machine.TestCase
