"""Sends mutated requests of every RPC to a server of our own, and fails if it comes to harm.

    python scripts/fuzz_requests.py --seconds 120 --out build/fuzz-requests

Each has to be served or refused for a reason that the server tells, and the server to live, keep its memory, give
everything back and answer others as if nobody were there. Requests that did harm are kept in OUT/failures;
`--replay FILE` sends one of them again.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("proto", "server", "kernels", "")]

from benchmarks.fuzz.caller import Caller  # noqa: E402 -- found by the path above
from benchmarks.fuzz.campaign import Report, run  # noqa: E402
from benchmarks.fuzz.methods import methods  # noqa: E402
from benchmarks.fuzz.mutants import Mutant, Mutants  # noqa: E402
from benchmarks.fuzz.stand import Stand  # noqa: E402
from benchmarks.fuzz.verdict import problem_of  # noqa: E402
from gralora_server.loadtest.local_server import LocalServer  # noqa: E402

MAX_SHOWN = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=10**9, help="at most so many")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz-requests")
    parser.add_argument("--replay", type=Path, help="a file of OUT/failures: only that request is sent")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        stand = Stand.write(Path(folder))
        with stand.server() as server:
            if options.replay is not None:
                return replay(server, Mutant.read(options.replay, methods()))
            mutants = Mutants(options.seed, methods(), stand.seeds)
            report = asyncio.run(run(stand, server, mutants, requests=options.requests, seconds=options.seconds))
    show(report)
    keep(report, options.out / "failures")
    return int(bool(report.problems))


def replay(server: LocalServer, mutant: Mutant) -> int:
    async def send() -> str | None:
        async with Caller(server.address) as caller:
            ending = await caller.send(mutant)
        print(f"{mutant.method.path}: {ending}")
        return problem_of(ending)

    problem = asyncio.run(send())
    print(problem or "as it may end")
    return int(problem is not None)


def show(report: Report) -> None:
    """What came of each RPC, and of all."""
    of_method: dict[str, Counter[str]] = {}
    for (method, label), count in report.saw.items():
        of_method.setdefault(method, Counter())[label] += count
    for method, labels in sorted(of_method.items()):
        print(f"{method}: {', '.join(f'{count} {label}' for label, count in labels.most_common())}")
    rate = report.requests / report.seconds
    print(f"{report.requests} mutated requests in {report.seconds:.0f} s, {rate:.0f} a second; {report.probes} probes")
    if report.memory_bytes:
        first, last = (num_bytes / 2**20 for num_bytes in report.growth_bytes)
        print(f"the server's memory: {first:.0f} MiB after a quarter, {last:.0f} MiB at the end")
        tenths = report.memory_bytes[:: max(1, len(report.memory_bytes) // 10)]
        print(f"on the way: {', '.join(f'{num_bytes / 2**20:.0f}' for num_bytes in tenths)} MiB")


def keep(report: Report, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for problem in report.problems[:MAX_SHOWN]:
        print(problem, file=sys.stderr)
    for number, mutant in report.offenders.items():
        folder.mkdir(parents=True, exist_ok=True)
        mutant.write(folder / f"{number}.json")
        print(f"repeat it: python scripts/fuzz_requests.py --replay {folder / f'{number}.json'}", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end the server on the way
    sys.exit(main())
