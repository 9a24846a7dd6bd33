"""The audit of packages: a vulnerability fails it, and nobody's silence is taken for a good answer."""

from __future__ import annotations

from pathlib import Path

import audit_packages
from audit_packages import audit

PINS = ["one==1", "two==2"]
HOLE = {"id": "PYSEC-1", "fix_versions": ["2.1", "3"]}


def clean(pins: list[str]) -> audit_packages.Answers:
    return [{"name": pin.partition("==")[0], "version": pin.partition("==")[2], "vulns": []} for pin in pins]


def test_packages_without_vulnerabilities_pass_without_a_word() -> None:
    assert audit(PINS, clean) == (0, [])


def test_a_vulnerability_fails_and_says_what_mends_it() -> None:
    def holed(pins: list[str]) -> audit_packages.Answers:
        return [one | {"vulns": [HOLE] if one["name"] == "two" else []} for one in clean(pins)]

    assert audit(PINS, holed) == (1, ["two 2: PYSEC-1, fixed in 2.1, 3"])


def test_an_index_without_the_database_is_asked_once_and_said_to_be_none() -> None:
    asked: list[list[str]] = []

    def silent(pins: list[str]) -> audit_packages.Answers:
        asked.append(pins)
        return [{"name": pin, "skip_reason": "not found"} for pin in pins]

    code, (line,) = audit(PINS, silent)

    assert code == 0
    assert "nothing was audited" in line
    assert asked == [PINS[:1]]


def test_a_package_that_nobody_answers_for_is_counted() -> None:
    def half(pins: list[str]) -> audit_packages.Answers:
        return [*clean(pins[:1]), *({"name": pin, "skip_reason": "not found"} for pin in pins[1:])]

    assert audit(PINS, half) == (0, ["warning: 1 packages were not audited"])


def test_what_is_asked_about_are_the_pins(monkeypatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(audit_packages, "ask", lambda pins: asked.append(pins) or clean(pins))
    constraints = (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines()

    assert audit_packages.main() == 0
    assert asked[-1] == [line for line in constraints if not line.startswith("#")]
