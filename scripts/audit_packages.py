"""Asks whether vulnerabilities are known in the packages of `constraints.txt`, and fails if so.

Where the database cannot be reached it warns and passes. pip-audit itself takes a package that nobody answers for as
one without vulnerabilities, and an index without the database answers for none: so it is asked about one first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
LIMIT_S = 600

Answers = list[dict[str, Any]]  # pip-audit's, one for each package


def main() -> int:
    pins = [line for line in CONSTRAINTS.read_text().splitlines() if "==" in line]
    code, lines = audit(pins, ask)
    for line in lines:
        sys.stderr.write(f"{line}\n")
    return code


def audit(pins: list[str], ask: Callable[[list[str]], Answers]) -> tuple[int, list[str]]:
    """The exit code, and what to say."""
    if not _answered(ask(pins[:1])):
        return 0, ["warning: nothing was audited, because the database of vulnerabilities cannot be reached"]
    answers = ask(pins)
    found = list(_findings(answers))
    left_out = len(pins) - len(_answered(answers))
    return 1 if found else 0, [*found, *([f"warning: {left_out} packages were not audited"] if left_out else [])]


def ask(pins: list[str]) -> Answers:
    """Nothing, if the answer is none."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--requirement", file.name, "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)  # noqa: S603 -- ours
    try:
        return list(json.loads(done.stdout)["dependencies"])
    except ValueError:
        sys.stderr.write(done.stderr)
        return []


def _answered(answers: Answers) -> Answers:
    return [one for one in answers if "skip_reason" not in one]


def _findings(answers: Answers) -> Iterable[str]:
    for one in answers:
        for hole in one.get("vulns", ()):
            fixed = ", ".join(hole["fix_versions"]) or "no version yet"
            yield f"{one['name']} {one['version']}: {hole['id']}, fixed in {fixed}"


if __name__ == "__main__":
    sys.exit(main())
