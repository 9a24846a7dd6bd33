"""Reads mutated configuration files as `gralora config check` does, and fails if one does more than be refused.

    python scripts/fuzz_configs.py --seconds 30 --out build/fuzz-configs

Each has to be accepted or refused with ConfigInvalidError, in two seconds of processor time, and all of them together
within 64 MiB. Files that did harm are kept in OUT/failures; `gralora config check FILE` reads one of them again.
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

from benchmarks.fuzz.configs import MAX_MEMORY_BYTES, Configs, Findings, read, run  # noqa: E402 -- by the path above

MAX_SHOWN = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--configs", type=int, default=10**9, help="at most so many")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz-configs")
    options = parser.parse_args()
    configs = Configs(options.seed)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        first = Path(folder) / "first.toml"
        first.write_bytes(configs.make(0))
        read(first)  # what is loaded once is no file's fault
        before_bytes = peak_bytes()
        findings = run(configs, Path(folder), number=options.configs, seconds=options.seconds)
    took_bytes = peak_bytes() - before_bytes
    show(findings, took_bytes)
    keep(findings, configs, options.out / "failures")
    return int(bool(findings.problems) or took_bytes > MAX_MEMORY_BYTES)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(findings: Findings, took_bytes: int) -> None:
    saw = ", ".join(f"{count} {label}" for label, count in findings.saw.most_common())
    rate = findings.configs / findings.seconds
    print(f"{findings.configs} mutated configurations in {findings.seconds:.0f} s, {rate:.0f} a second: {saw}")
    print(f"they took {took_bytes / 2**20:.1f} MiB at most")


def keep(findings: Findings, configs: Configs, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for number, problem in findings.problems.items():
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{number}.toml"
        file.write_bytes(configs.make(number))
        if number in list(findings.problems)[:MAX_SHOWN]:
            print(f"{problem}\nrepeat it: gralora config check {file}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
