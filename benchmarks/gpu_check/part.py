"""One part, in a process of its own: notes what it finds as lines of JSON, each as soon as it is known."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import Check

Line = dict[str, Any]


def main() -> None:
    """`part.py NAME MACHINE FOUND`: all lines go to the file FOUND, where nothing that libraries print can be."""
    name, machine, found = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("torch sees no GPU here; with --dry everything runs on the CPU")
    with found.open("w") as opened:
        for line in run(name, machine):
            opened.write(json.dumps(line) + "\n")
            opened.flush()  # what is known stays known if the time is up
            print(json.dumps(line), flush=True)


def run(name: str, machine: Line) -> Iterator[Line]:
    """The part of this name. Imports are its own: that of transformers takes seconds."""
    if name == "facts":
        from benchmarks.gpu_check.facts import facts

        yield {"what": "facts"} | facts()
    elif name.startswith("kernels-"):
        from benchmarks.gpu_check import kernels

        with kernels.poisoned_memory():
            yield from checked(kernels.checks(getattr(torch, name.removeprefix("kernels-"))))
    elif name == "programs":
        from benchmarks.gpu_check import programs

        yield from checked(programs.checks())
    elif name == "tests":
        from benchmarks.gpu_check import tests

        yield from checked(tests.checks())
    elif name == "served":
        from benchmarks.gpu_check.served import served

        yield from served(machine)
    elif name in ("steps", "transformers", "attention", "loads"):
        from benchmarks.gpu_check import speed

        yield from speed.PARTS[name](machine)
    else:
        raise ValueError(f"there is no part {name!r}")


def checked(checks: Iterable[Check]) -> Iterator[Line]:
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
