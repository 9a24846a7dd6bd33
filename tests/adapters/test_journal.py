"""What the journal was told is done is done, whoever is killed; what it was not, has not happened by half."""

from __future__ import annotations

import random
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.promoter import NAMES, Promoters, name_row, promote, version_row

from gralora_runtime.adapters.catalogue.database import FILE, LOCK
from gralora_runtime.adapters.catalogue.journal import Journal, NameRow, VersionRow
from gralora_runtime.errors import CatalogueError

NUM_LIVES = 100
FILES = {FILE, LOCK, f"{FILE}-wal", f"{FILE}-shm"}


def version(name: str = "a", number: int = 1, **fields: Any) -> VersionRow:
    return replace(version_row(name, number), **fields)


def name(name: str = "a", **fields: Any) -> NameRow:
    """One that points at no version."""
    return replace(name_row(name, 1), **({"current": None, "newest": None, "versions": ()} | fields))


def statements(journal: Journal) -> list[str]:
    """Those that SQLite runs from now on."""
    seen: list[str] = []
    journal._connection.set_trace_callback(seen.append)
    return seen


def rows_on_disk(folder: Path) -> tuple[NameRow, ...]:
    with closing(Journal.open(folder)) as journal:
        return journal.names()


@pytest.fixture(params=["memory", "disk"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal.open(None if request.param == "memory" else tmp_path)) as journal:
        yield journal


@pytest.fixture(scope="module")
def promoters() -> Iterator[Promoters]:
    with Promoters() as promoters:
        yield promoters


# Rows.

FULL = NameRow(
    name="b",
    current=3,
    previous=1,
    newest=12,
    last_number=40,
    seen='{"/srv": [[1, 2]]}',
    canary=12,
    canary_share=0.25,
    pinned=True,
    unloaded=True,
    versions=(
        version("b", 1, stored=False, pinned=True, created_s=1.5, last_used_s=1e9, error="no such file"),
        version("b", 3, source="/srv/\udcff/ünï'; --\0", error="half a character: \ud83d"),
        version("b", 12, digest="", source=""),
    ),
)


def save(journal: Journal, row: NameRow) -> None:
    with journal.transaction():
        journal.save_name(row)
        for each in row.versions:
            journal.save_version(each)


def test_every_field_comes_back(journal: Journal) -> None:
    save(journal, FULL)
    save(journal, name("a"))

    assert (name("a"), FULL) == journal.names()


def test_every_field_is_there_in_the_next_process(tmp_path: Path) -> None:
    with closing(Journal.open(tmp_path)) as journal:
        save(journal, FULL)

    assert rows_on_disk(tmp_path) == (FULL,)


def test_a_new_catalogue_is_empty_and_in_its_directory(tmp_path: Path) -> None:
    assert rows_on_disk(tmp_path / "new" / "state") == ()
    assert {FILE, LOCK} == {path.name for path in (tmp_path / "new" / "state").iterdir()}


def test_saving_again_replaces_fields_and_keeps_versions(journal: Journal) -> None:
    save(journal, FULL)
    changed = replace(
        FULL, canary=None, canary_share=0.0, pinned=False, unloaded=False, previous=None, newest=None, current=12
    )
    journal.save_name(replace(changed, versions=()))
    journal.save_version(version("b", 3, error="another"))

    first, _, last = FULL.versions
    assert (replace(changed, versions=(first, version("b", 3, error="another"), last)),) == journal.names()


def test_removing_a_name_takes_its_versions_and_no_others(journal: Journal) -> None:
    save(journal, FULL)
    save(journal, name_row("a", 2))
    journal.remove_name("b")

    assert (name_row("a", 2),) == journal.names()
    assert journal.versions_of(FULL.versions[1].digest) == ()


def test_removing_what_is_not_there_changes_nothing(journal: Journal) -> None:
    save(journal, FULL)
    journal.remove_name("a")
    journal.remove_version("b", 2)
    journal.remove_version("a", 1)

    assert journal.names() == (FULL,)


@pytest.mark.parametrize("pointer", ["current", "previous", "newest", "canary"])
def test_no_name_points_at_a_version_that_is_not_there(journal: Journal, pointer: str) -> None:
    save(journal, name("a", versions=(version("a", 1),)))
    save(journal, name("b", versions=(version("b", 2),)))

    with pytest.raises(sqlite3.IntegrityError):
        journal.save_name(name("a", **{pointer: 2}))
    journal.save_name(name("a", **{pointer: 1}))
    with pytest.raises(sqlite3.IntegrityError):
        journal.remove_version("a", 1)

    assert name("a", **{pointer: 1}, versions=(version("a", 1),)) == journal.names()[0]


def test_no_version_is_without_its_name(journal: Journal) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        journal.save_version(version())

    assert journal.versions_of(version().digest) == ()


@pytest.mark.parametrize("number", [0, -1, "one", None, 1.5])
def test_versions_are_numbered_from_one(journal: Journal, number: Any) -> None:
    journal.save_name(name())
    with pytest.raises(sqlite3.IntegrityError):
        journal.save_version(replace(version(), number=number))

    assert (name(),) == journal.names()


@pytest.mark.parametrize("share", [-0.001, 1.001, float("nan"), float("inf"), "half", None])
def test_a_share_is_one(journal: Journal, share: Any) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        journal.save_name(name(canary_share=share))

    assert journal.names() == ()


def test_versions_of_a_content_are_found_under_all_names(journal: Journal) -> None:
    shared = [version("a", 2, digest="d"), version("b", 1, digest="d"), version("b", 11, digest="d")]
    save(journal, name("b", versions=(shared[1], version("b", 2), shared[2])))
    save(journal, name("a", versions=(version("a", 1), shared[0])))

    assert tuple(shared) == journal.versions_of("d")


def test_a_content_is_looked_up_and_not_searched_for(journal: Journal) -> None:
    seen = statements(journal)
    journal.versions_of("d")
    plan = journal._connection.execute(f"EXPLAIN QUERY PLAN {seen[0]}").fetchall()

    assert any("SEARCH versions USING INDEX versions_by_digest (digest=?)" in row[3] for row in plan), plan


def test_all_names_are_read_by_two_statements_however_many_there_are(journal: Journal) -> None:
    with journal.transaction():
        for index in range(200):
            save(journal, name_row(f"name{index:03}", 3))
    seen = statements(journal)

    assert tuple(name_row(f"name{index:03}", 3) for index in range(200)) == journal.names()
    assert len(seen) == 2


# Changes.


def test_what_a_transaction_changed_before_it_raised_has_not_happened(journal: Journal) -> None:
    def change() -> None:
        with journal.transaction():
            journal.remove_name("b")
            journal.save_name(name("a"))
            with journal.transaction():
                journal.save_version(version("a"))
            raise ZeroDivisionError

    save(journal, FULL)
    with pytest.raises(ZeroDivisionError):
        change()

    assert journal.names() == (FULL,)


def test_a_transaction_that_breaks_a_rule_at_its_end_has_not_happened(journal: Journal) -> None:
    def change() -> None:
        with journal.transaction():
            journal.save_name(name("a", current=1))
            journal.remove_version("b", 1)

    save(journal, FULL)
    with pytest.raises(sqlite3.IntegrityError):
        change()
    journal.save_name(name("c"))

    assert (FULL, name("c")) == journal.names()


def test_a_use_is_noted_where_it_was(journal: Journal) -> None:
    save(journal, FULL)
    save(journal, name_row("a", 2))
    journal.touch({("a", 2): 7.5, ("b", 1): 8.5, ("b", 2): 9.5, ("gone", 1): 9.5})
    journal.touch({})

    first, *rest = FULL.versions
    a, b = journal.names()
    assert (version("a", 1), version("a", 2, last_used_s=7.5)) == a.versions
    assert replace(FULL, versions=(replace(first, last_used_s=8.5), *rest)) == b


def test_changes_wait_for_the_disk_and_uses_do_not(journal: Journal) -> None:
    """By the safety level at each commit, because no test can cut the power."""
    (level,) = journal._connection.execute("PRAGMA synchronous").fetchone()
    levels = {2: "FULL"}
    at_commits: list[str] = []

    def watch(statement: str) -> None:
        nonlocal level
        if statement.startswith("PRAGMA synchronous = "):
            level = statement.rpartition(" ")[2]
        elif statement == "COMMIT":
            at_commits.append(levels.get(level, level))

    journal._connection.set_trace_callback(watch)
    promote(journal, "a", 1)
    journal.touch({("a", 1): 1.0, ("a", 2): 2.0})
    journal.save_name(name("b"))
    journal.save_version(version("b", 1))
    journal.remove_version("b", 1)
    journal.remove_name("b")
    journal._connection.set_trace_callback(None)

    assert at_commits == ["FULL", "NORMAL", "FULL", "FULL", "FULL", "FULL"]
    assert journal._connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_threads_take_turns(journal: Journal) -> None:
    def work(name: str) -> None:
        for number in range(1, 31):
            promote(journal, name, number)
            journal.touch({(name, number): 0.0})
            assert any(row == name_row(name, number) for row in journal.names())

    with ThreadPoolExecutor(len(NAMES)) as pool:
        list(pool.map(work, NAMES))

    assert tuple(name_row(each, 30) for each in NAMES) == journal.names()


def test_nobody_reads_what_is_not_done_yet(journal: Journal) -> None:
    with ThreadPoolExecutor(2) as pool:
        with journal.transaction():
            save(journal, name_row("a", 1))
            reading = [pool.submit(journal.names), pool.submit(journal.versions_of, version().digest)]
            for each in reading:
                with pytest.raises(TimeoutError):
                    each.result(timeout=0.2)

        assert [each.result() for each in reading] == [(name_row("a", 1),), (version(),)]


def test_a_full_disk_is_told_and_leaves_all_as_it_was(journal: Journal) -> None:
    save(journal, FULL)
    (pages,) = journal._connection.execute("PRAGMA page_count").fetchone()
    journal._connection.execute(f"PRAGMA max_page_count = {pages}")
    large = name("a", versions=(version("a", source="x" * 100_000),))
    with pytest.raises(CatalogueError, match="database or disk is full; see to the disk"):
        save(journal, large)
    assert journal.names() == (FULL,)

    journal._connection.execute("PRAGMA max_page_count = 1000")
    save(journal, large)
    assert journal.names() == (large, FULL)


def test_a_text_that_is_none_any_more_is_damage(journal: Journal) -> None:
    save(journal, FULL)
    journal._connection.execute("UPDATE versions SET source = x'ff' WHERE number = 3")

    with pytest.raises(CatalogueError, match=r"is damaged: .*; move catalogue\.sqlite\* away"):
        journal.names()


# A process that ends.


def check_after_a_kill(folder: Path, done: dict[str, int]) -> None:
    """Everything that was told is there; of what was not, at most the one promotion that was on its way."""
    with closing(Journal.open(folder)) as journal:
        assert journal._connection.execute("PRAGMA quick_check").fetchall() == [("ok",)]
        assert {path.name for path in folder.iterdir()} <= FILES
        rows = journal.names()
    current = {row.name: row.current or 0 for row in rows}
    ahead = {name: number - done.get(name, 0) for name, number in current.items() if number != done.get(name, 0)}

    assert done.keys() <= current.keys()
    assert list(ahead.values()) in ([], [1])
    assert [name_row(row.name, row.current or 0) for row in rows] == list(rows), "with all versions, and no others"
    done |= current


def test_it_survives_kill_9_at_any_moment(tmp_path: Path, promoters: Promoters) -> None:
    rng = random.Random(9)
    done: dict[str, int] = {}
    for _ in range(NUM_LIVES):
        child = promoters.start(tmp_path)
        for _ in range(rng.randrange(12)):
            done.update([promoters.done()])
        time.sleep(rng.uniform(0, 0.008))  # somewhere in opening, promoting, checkpointing
        done.update(promoters.kill(child))
        check_after_a_kill(tmp_path, done)

    assert sum(done.values()) > 3 * NUM_LIVES, "they lived long enough"


def test_it_survives_kill_9_while_it_is_made(tmp_path: Path, promoters: Promoters) -> None:
    rng = random.Random(9)
    for life in range(NUM_LIVES // 2):
        child = promoters.start(tmp_path / str(life))
        time.sleep(rng.uniform(0, 0.012))
        check_after_a_kill(tmp_path / str(life), dict(promoters.kill(child)))


def test_another_process_is_refused_while_it_lives(tmp_path: Path, promoters: Promoters) -> None:
    child = promoters.start(tmp_path)
    promoters.done()
    with pytest.raises(CatalogueError, match=f"{FILE} another process has it open; end that process"):
        Journal.open(tmp_path)
    promoters.kill(child)

    assert rows_on_disk(tmp_path)


def test_any_thread_may_close_it_and_the_next_may_open_it(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    with pytest.raises(CatalogueError, match="another process has it open"):
        Journal.open(tmp_path)
    closer = threading.Thread(target=journal.close)
    closer.start()
    closer.join()

    assert rows_on_disk(tmp_path) == ()
    assert {FILE, LOCK} == {path.name for path in tmp_path.iterdir()}


# Any order of all of it.

names = st.sampled_from(["a", "b", "c"])
numbers = st.integers(1, 4)
pointers = st.one_of(*[st.none()] * 4, numbers)  # most of what is pointed at is not there
times_s = st.floats(0, 1e10)
texts = st.text(st.characters(codec=None), max_size=8)
version_fields = st.fixed_dictionaries(
    {
        "digest": st.sampled_from(["d1", "d2", "d3"]),
        "source": texts,
        "stored": st.booleans(),
        "pinned": st.booleans(),
        "created_s": times_s,
        "last_used_s": times_s,
        "error": texts,
    }
)
name_fields = st.fixed_dictionaries(
    {
        "current": pointers,
        "previous": pointers,
        "newest": pointers,
        "last_number": st.integers(0, 40),
        "seen": st.sampled_from(["{}", '{"/a": [[1, 2]]}']),
        "canary": pointers,
        "canary_share": st.floats(0, 1),
        "pinned": st.booleans(),
        "unloaded": st.booleans(),
    }
)


class Model:
    """Two dictionaries that follow the same rules."""

    def __init__(self) -> None:
        self.names: dict[str, NameRow] = {}
        self.versions: dict[tuple[str, int], VersionRow] = {}

    def copy(self) -> Model:
        copy = Model()
        copy.names, copy.versions = dict(self.names), dict(self.versions)
        return copy

    def remove_name(self, name: str) -> None:
        self.names.pop(name, None)
        self.versions = {key: row for key, row in self.versions.items() if key[0] != name}

    def is_sound(self) -> bool:
        pointers = {
            (row.name, number)
            for row in self.names.values()
            for number in (row.current, row.previous, row.newest, row.canary)
        }
        return all(key in self.versions for key in pointers if key[1]) and all(
            name in self.names for name, _ in self.versions
        )

    def rows(self) -> tuple[NameRow, ...]:
        return tuple(
            replace(row, versions=tuple(self.versions[key] for key in sorted(self.versions) if key[0] == name))
            for name, row in sorted(self.names.items())
        )


class Changes(RuleBasedStateMachine):
    """A transaction is begun, filled, and committed or given up; a change outside of one is one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.journal = Journal.open(self.folder)
        self.model = Model()
        self.outside: tuple[Any, Model] | None = None  # an open transaction, and what it began with

    def teardown(self) -> None:
        self.give_up()
        self.journal.close()
        shutil.rmtree(self.folder)

    def change(self, changed: Model, call: Any, *arguments: Any) -> None:
        if self.outside is None and not changed.is_sound():
            with pytest.raises(sqlite3.IntegrityError):
                call(*arguments)
        else:
            call(*arguments)
            self.model = changed

    @rule(name=names, fields=name_fields)
    def save_name(self, name: str, fields: dict[str, Any]) -> None:
        changed, row = self.model.copy(), NameRow(name=name, **fields)
        changed.names[name] = row
        self.change(changed, self.journal.save_name, row)

    @rule(name=names, number=numbers, fields=version_fields)
    def save_version(self, name: str, number: int, fields: dict[str, Any]) -> None:
        changed, row = self.model.copy(), VersionRow(name=name, number=number, **fields)
        changed.versions[name, number] = row
        self.change(changed, self.journal.save_version, row)

    @rule(name=names, number=numbers)
    def remove_version(self, name: str, number: int) -> None:
        changed = self.model.copy()
        changed.versions.pop((name, number), None)
        self.change(changed, self.journal.remove_version, name, number)

    @rule(name=names)
    def remove_name(self, name: str) -> None:
        changed = self.model.copy()
        changed.remove_name(name)
        self.change(changed, self.journal.remove_name, name)

    @precondition(lambda self: self.outside is None)
    @rule(uses=st.dictionaries(st.tuples(names, numbers), times_s))
    def touch(self, uses: dict[tuple[str, int], float]) -> None:
        self.journal.touch(uses)
        for key in uses.keys() & self.model.versions.keys():
            self.model.versions[key] = replace(self.model.versions[key], last_used_s=uses[key])

    @precondition(lambda self: self.outside is None)
    @rule()
    def begin(self) -> None:
        transaction = self.journal.transaction()
        transaction.__enter__()
        self.outside = transaction, self.model.copy()

    @precondition(lambda self: self.outside is not None)
    @rule()
    def commit(self) -> None:
        assert self.outside
        (transaction, before), self.outside = self.outside, None
        if self.model.is_sound():
            transaction.__exit__(None, None, None)
        else:
            with pytest.raises(sqlite3.IntegrityError):
                transaction.__exit__(None, None, None)
            self.model = before

    @rule()
    def give_up(self) -> None:
        if self.outside:
            (transaction, self.model), self.outside = self.outside, None
            transaction.__exit__(InterruptedError, InterruptedError(), None)

    @precondition(lambda self: self.outside is None)
    @rule()
    def reopen(self) -> None:
        self.journal.close()
        self.journal = Journal.open(self.folder)

    @invariant()
    def the_rows_are_those_of_the_model(self) -> None:
        assert self.model.rows() == self.journal.names()
        for digest in ("d1", "d2", "d3"):
            wanted = (self.model.versions[key] for key in sorted(self.model.versions))
            assert tuple(row for row in wanted if row.digest == digest) == self.journal.versions_of(digest)


TestAnyOrder = Changes.TestCase
TestAnyOrder.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
