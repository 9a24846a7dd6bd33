"""A few hundred of the files that settings name, of one seed; `make fuzz` reads tens of thousands."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fuzz.configs import ACCEPTED, REFUSED, run
from benchmarks.fuzz.named_files import NUM_KINDS, NamedFiles

SEED, NUM_FILES = 7, 300


def test_they_are_read_or_refused(tmp_path: Path) -> None:
    findings = run(NamedFiles(SEED), tmp_path, number=NUM_FILES, seconds=60.0)

    assert findings.problems == {}
    assert findings.configs == NUM_FILES
    assert findings.saw.keys() == {ACCEPTED, REFUSED}


@pytest.mark.parametrize("kind", range(NUM_KINDS))
def test_some_of_each_kind_are_right(kind: int, tmp_path: Path) -> None:
    """Or else they would all be refused for the same reason."""
    files, file = NamedFiles(SEED), tmp_path / "file"
    labels = set()
    for number in range(kind, NUM_FILES, NUM_KINDS):
        file.write_bytes(files.make(number))
        labels.add(files.read(number, file).label)

    assert labels == {ACCEPTED, REFUSED}


def test_one_that_raises_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_profile: object) -> None:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr("benchmarks.fuzz.named_files.prices_of", fail)

    findings = run(NamedFiles(SEED), tmp_path, number=30, seconds=60.0)

    assert "ZeroDivisionError: float division by zero" in findings.problems.values()
