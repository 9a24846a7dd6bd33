"""Reads mutated configuration files and files that they name as a server does that is started with them, and fails if
one does more than be refused.

    python scripts/fuzz_configs.py --seconds 30 --out build/fuzz-configs

Each has to be accepted or refused with ConfigError, in two seconds of processor time, and all of them together within
64 MiB. Files that did harm are kept in OUT/failures; the same seed makes them again.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("proto", "server", "kernels", "")]

from benchmarks.fuzz.configs import MAX_MEMORY_BYTES, Configs, Files, Findings, run  # noqa: E402 -- by the path above
from benchmarks.fuzz.named_files import NUM_KINDS, NamedFiles  # noqa: E402

MAX_SHOWN = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--configs", type=int, default=10**9, help="at most so many")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz-configs")
    options = parser.parse_args()
    kinds: dict[str, Files] = {"configurations": Configs(options.seed), "files named by them": NamedFiles(options.seed)}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for files in kinds.values():
            run(
                files, Path(folder), number=NUM_KINDS, seconds=options.seconds
            )  # what is loaded once is no file's fault
        before_bytes, ends_well = peak_bytes(), True
        for what, files in kinds.items():
            seconds = options.seconds / len(kinds)
            findings = run(files, Path(folder), number=options.configs, seconds=seconds)
            show(what, findings)
            keep(findings, files, options.out / "failures" / what.split()[0])
            ends_well = ends_well and not findings.problems
    took_bytes = peak_bytes() - before_bytes
    print(f"they took {took_bytes / 2**20:.1f} MiB at most")
    return int(not ends_well or took_bytes > MAX_MEMORY_BYTES)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(what: str, findings: Findings) -> None:
    saw = ", ".join(f"{count} {label}" for label, count in findings.saw.most_common())
    rate = findings.configs / findings.seconds
    print(f"{findings.configs} mutated {what} in {findings.seconds:.0f} s, {rate:.0f} a second: {saw}")


def keep(findings: Findings, files: Files, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for number, problem in findings.problems.items():
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / str(number)
        file.write_bytes(files.make(number))
        if number in list(findings.problems)[:MAX_SHOWN]:
            print(f"{problem}\nsee {file}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
