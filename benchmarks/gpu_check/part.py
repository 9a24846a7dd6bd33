"""One part, in a process of its own: says what it finds as lines of JSON, each as soon as it is known."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_check import kernels, programs, speed
from benchmarks.gpu_check.facts import facts

Line = dict[str, Any]


def main() -> None:
    """`part.py NAME MACHINE`."""
    name, machine = sys.argv[1], json.loads(sys.argv[2])
    for line in run(name, machine):
        print("\x1e" + json.dumps(line), flush=True)  # told from whatever libraries print


def run(name: str, machine: Line) -> Iterator[Line]:
    """The part of this name."""
    if name == "facts":
        yield {"what": "facts"} | facts()
    elif name in ("kernels", "programs"):
        yield from checked(kernels.checks() if name == "kernels" else programs.checks())
    elif name == "steps":
        yield from speed.steps(machine)
    elif name == "transformers":
        yield from speed.transformers_steps()
    elif name == "attention":
        yield from speed.attention(machine)
    elif name == "loads":
        yield from speed.loading()
    else:
        raise ValueError(f"there is no part {name!r}")


def checked(checks: Iterator[kernels.Check]) -> Iterator[Line]:
    """Each check, whatever becomes of the others."""
    for name, check in checks:
        try:
            line = {"passed": True, "detail": check()}
        except Exception as error:
            traceback.print_exc()
            line = {"passed": False, "detail": f"{type(error).__name__}: {error}".splitlines()[0]}
        yield {"what": "check", "name": name} | line


if __name__ == "__main__":
    main()
