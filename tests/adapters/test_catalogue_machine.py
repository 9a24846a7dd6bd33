"""Everything that may happen to adapters, in any order, against a model that is a few dictionaries.

After each step the books add up, and whatever was served is what the model says: this content, under this version.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from adapters.harness import WAIT_S, manager_of, quiesce, until
from adapters.test_versions import digest_of, write_version
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule
from support.thorough import MANY

from gralora_runtime.adapters.catalogue.catalogue import Retention
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.errors import (
    AdapterBusyError,
    AdapterCapacityError,
    AdapterError,
    AdapterNotFoundError,
    AdapterVersionNotFoundError,
    InvalidRequestError,
)

NAMES = ("a", "b", "acme/c", "d")
CONTENTS = range(6)
MAX_VERSIONS = 4
name_of, content_of = st.sampled_from(NAMES), st.sampled_from(CONTENTS)


class Known:
    """What the model knows of one name."""

    def __init__(self) -> None:
        self.on_disk: int | None = None  # content
        self.versions: dict[int, int] = {}  # number -> content, those that were seen
        self.promoted = self.previous = self.newest = 0
        self.canary: tuple[int, float] | None = None
        self.last = 0  # number that was given
        self.unloaded = False


class Machine(RuleBasedStateMachine):
    """Room for three of six contents, host memory for one, copies for all."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.root, self.state = self.folder / "adapters", self.folder / "state"
        self.root.mkdir()
        self.known = {name: Known() for name in NAMES}
        self.digests: dict[int, str] = {}
        self.held: list[tuple[AdapterLease, str]] = []
        self.manager = self.open()

    def open(self) -> AdapterManager:
        return manager_of(
            self.root, units=3, host_units=1, state_dir=self.state, retention=Retention(max_versions=MAX_VERSIONS)
        )

    def teardown(self) -> None:
        for lease, _ in self.held:
            self.manager.release(lease)
        quiesce(self.manager)
        self.manager.check_integrity()
        self.manager.close()
        shutil.rmtree(self.folder)

    # What happens.

    @rule(name=name_of, content=content_of)
    def files_change(self, name: str, content: int) -> None:
        """And the server hears of it, as from a watcher."""
        path = write_version(self.root, name, content)
        self.digests.setdefault(content, digest_of(path))
        known = self.known[name]
        known.on_disk = content
        self.manager.refresh(name)
        self.settle()
        if known.promoted and not known.unloaded:
            self.see(name)

    @rule(name=name_of)
    def files_go(self, name: str) -> None:
        """What was read has a copy, so only names that nobody has read leave the list."""
        self.adopt(name)
        shutil.rmtree(self.root / name, ignore_errors=True)
        self.known[name].on_disk = None
        self.manager.refresh(name)
        self.settle()
        alias = self.manager._store.find(name)
        assert alias is None or (alias.is_known and alias.gone), name

    @rule(name=name_of)
    def load(self, name: str) -> None:
        known = self.known[name]
        loading = self.manager.load(name)
        if known.on_disk is None:
            with pytest.raises(AdapterNotFoundError):
                loading.result(WAIT_S)
            return
        try:
            loading.result(WAIT_S)
        except AdapterCapacityError:
            if not known.promoted or known.unloaded:  # a name that found no room is not kept
                self.adopt(name)
                return
        self.settle()  # it is copied, too: a crash before that leaves nothing but its directory
        known.unloaded = False
        self.see(name)
        self.adopt(name)

    @rule(name=name_of, key=st.sampled_from(["x", "y", "z"]), hold=st.booleans())
    def generate(self, name: str, key: str, hold: bool) -> None:
        known = self.known[name]
        try:
            lease = self.ask(name, key)
        except AdapterNotFoundError:
            assert known.unloaded or known.on_disk is None, name
            return
        except AdapterCapacityError:
            return
        if lease is None:
            return
        assert not known.unloaded, f"{name} was unloaded"
        self.see(name)
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
            assert known.unloaded or known.on_disk is None, name
        except AdapterCapacityError:
            pass
        else:
            if lease is not None:
                self.see(name)
                assert (lease.version, lease.digest) == (number, self.digests[known.versions[number]])
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
        self.stand_for(known, number)

    @rule(name=name_of)
    def roll_back(self, name: str) -> None:
        known = self.known[name]
        if self.refused(lambda: self.manager.roll_back(name), known.previous in known.versions, name):
            return
        self.stand_for(known, known.previous)

    @rule(name=name_of, number=st.integers(1, 4), share=st.sampled_from([0.0, 0.5, 1.0]))
    def try_a_canary(self, name: str, number: int, share: float) -> None:
        known = self.known[name]
        allowed = share == 0.0 or (number in known.versions and number != known.promoted)
        if self.refused(lambda: self.manager.set_canary(name, str(number), share), allowed, name):
            return
        known.canary = None if share == 0.0 else (number, share)

    @rule(name=name_of, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        with contextlib.suppress(AdapterNotFoundError, AdapterCapacityError):
            self.manager.pin(name, pinned)
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
        assert alias is not None
        last = max(known.last, alias.last_number)  # one that nobody has read has a number, too
        self.known[name] = Known()
        self.known[name].on_disk, self.known[name].unloaded, self.known[name].last = known.on_disk, True, last

    @precondition(lambda self: not self.held)
    @rule()
    def restart(self) -> None:
        self.manager.close()
        self.manager = self.open()
        self.settle()
        for name in NAMES:
            self.adopt(name)

    @precondition(lambda self: not self.held)
    @rule()
    def crash(self) -> None:
        """The disk as a kill would leave it after the last answer, and a server that begins with that."""
        self.manager.flush()
        self.settle_copies()  # a directory cannot be copied while it is removed
        left = self.folder / "left"
        shutil.copytree(self.state, left)
        self.manager.close()
        shutil.rmtree(self.state)
        left.rename(self.state)
        (self.state / "catalogue.lock").unlink(missing_ok=True)
        self.manager = self.open()
        self.settle()
        for name in NAMES:
            self.adopt(name)

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
            if known.unloaded:
                assert alias is None, name
            elif known.versions:
                assert alias is not None, name
                found = {number: v.digest for number, v in alias.versions.items() if v.digest}
                assert found == {number: self.digests[content] for number, content in known.versions.items()}, name
                assert (alias.promoted, alias.newest) == (known.promoted, known.newest), name

    # The model.

    def settle(self) -> None:
        """Until nothing is being looked up, read, copied or moved."""
        quiesce(self.manager)
        resolver = self.manager._discovery._resolver
        until(lambda: not resolver._asked and not any(a.refreshing for a in tuple(self.manager._store.aliases())))
        quiesce(self.manager)
        self.settle_copies()

    def settle_copies(self) -> None:
        copies = self.manager._persistence._copies
        assert copies is not None
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
            assert known.on_disk is not None
            known.last = alias.last_number
            known.versions = {known.last: known.on_disk}
            known.promoted = known.newest = known.last

    def see(self, name: str) -> None:
        """If the source has something, that is known now: somebody has read it."""
        known = self.known[name]
        if known.on_disk is None:  # it is served from a copy
            return
        same = [number for number, content in known.versions.items() if content == known.on_disk]
        number = same[0] if same else known.last + 1
        known.last = max(known.last, number)
        known.versions[number] = known.on_disk
        if number != known.newest:
            known.newest = number
            if known.promoted:
                self.stand_for(known, number)
            else:
                known.promoted = number
        self.prune(name)

    def prune(self, name: str) -> None:
        known = self.known[name]
        held = {lease.version for lease, _ in self.held if lease.name == name}
        kept = {known.promoted, known.previous, known.newest, known.canary[0] if known.canary else 0} | held
        too_many = len(known.versions) - MAX_VERSIONS
        for number in [number for number in sorted(known.versions) if number not in kept][: max(0, too_many)]:
            del known.versions[number]

    def stand_for(self, known: Known, number: int) -> None:
        if number != known.promoted:
            known.previous, known.promoted = known.promoted, number
        if known.canary and known.canary[0] == number:
            known.canary = None
        for name, one in self.known.items():
            if one is known:
                self.prune(name)

    def refused(self, call: Callable[[], object], allowed: bool, name: str) -> bool:
        try:
            call()
        except (AdapterError, InvalidRequestError):
            alias = self.manager._store.find(name)
            assert not allowed or alias is None or not alias.is_known, name
            return True
        self.settle()
        self.adopt(name)
        assert allowed or not self.known[name].versions, name
        return not allowed

    def check(self, lease: AdapterLease, name: str, key: str) -> None:
        known = self.known[name]
        assert lease.name == name
        assert lease.digest == self.digests[known.versions[lease.version]]
        if known.canary is not None and known.canary[1] == 1.0:
            assert lease.version == known.canary[0], key
        elif known.canary is None:
            assert lease.version == known.promoted


Machine.TestCase.settings = settings(
    max_examples=200 if MANY else 25,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=not MANY,
    phases=[Phase.generate],  # a failure that is made smaller takes minutes; its steps are printed as they are
    report_multiple_bugs=False,
)
TestMachine = Machine.TestCase
