"""`python -m benchmarks.startup`: how long `gralora serve` takes until it serves, and how long it is silent meanwhile.

Each round starts it twice as a process of its own: with an empty cache of kernels, which it fills, and with that one.
The model is prepared before. Writes JSON; fails if a gate does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.catalogue.gate import Gate, show
from benchmarks.machine import busy_share, facts
from gralora_server.model_fetch import ensure_default_model

OUT = Path(__file__).parent / "results" / "startup.json"
ADAPTERS = Path(__file__).parent.parent / "examples" / "adapters"
SERVE = (sys.executable, "-c", "from gralora_server.cli import main; main()", "serve", "--address", "127.0.0.1:0")
SERVING = "SERVING"
COLD, LATER = "no kernel compiled", "later"
MOST_S = {COLD: 20.0, LATER: 6.0}
MOST_SILENCE_S = 2.0
GIVE_UP_S = 600.0
# "Kernels: products: compiled, 9.0 s" and "Libraries: 3.1 s", but not what a stage says while it lasts.
STAGE = re.compile(r"gralora_server\.start: (.+?): (?:[^:]*, )?(\d+\.\d) s$")


@dataclass(frozen=True, slots=True)
class Line:
    """What a process printed. `at_s`: since its start."""

    at_s: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One, from the process to the line that says it serves."""

    serving_s: float
    longest_silence_s: float
    stages_s: Mapping[str, float]  # some run beside others


def lines_until(last: str, command: Sequence[str | Path], environment: Mapping[str, str]) -> list[Line]:
    """What a process prints; it is interrupted behind the line `last`. Raises RuntimeError if it ends without it."""
    said: list[Line] = []
    began_s = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        ending = threading.Timer(GIVE_UP_S, process.kill)
        ending.start()
        try:
            for text in process.stdout:
                said.append(Line(time.monotonic() - began_s, text.strip()))
                if last in text:
                    process.send_signal(signal.SIGINT)
                    break
            process.stdout.read()
        finally:
            process.wait()
            ending.cancel()
    if not said or last not in said[-1].text:
        raise RuntimeError("\n".join([f"it never said {last}:", *(line.text for line in said[-20:])]))
    return said


def longest_silence_s(said: Sequence[Line]) -> float:
    times_s = [0.0, *(line.at_s for line in said)]
    return max(later - sooner for sooner, later in pairwise(times_s))


def started(model: Path, adapters: Path, cache: Path) -> Start:
    """`cache`: of compiled kernels."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    said = lines_until(SERVING, [*SERVE, "--model", model, "--adapters", adapters], environment)
    stages = (found for line in said if (found := STAGE.search(line.text)))
    return Start(
        serving_s=said[-1].at_s,
        longest_silence_s=longest_silence_s(said),
        stages_s={found[1]: float(found[2]) for found in stages},
    )


def measure(model: Path, adapters: Path, rounds: int) -> dict[str, list[Start]]:
    found: dict[str, list[Start]] = {COLD: [], LATER: []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="startup-") as cache:
            for name in (COLD, LATER):
                found[name].append(started(model, adapters, Path(cache)))
    return found


def judge(found: Mapping[str, Sequence[Start]]) -> list[Gate]:
    """By the worst of all rounds."""
    gates = [
        Gate(f"seconds until it serves, {name}", max(start.serving_s for start in starts), MOST_S[name], is_speed=True)
        for name, starts in found.items()
    ]
    silence_s = max(start.longest_silence_s for starts in found.values() for start in starts)
    return [*gates, Gate("seconds of the longest silence", silence_s, MOST_SILENCE_S, is_speed=True)]


def _written(starts: Sequence[Start]) -> dict[str, Any]:
    names = dict.fromkeys(name for start in starts for name in start.stages_s)
    stages = {name: [start.stages_s[name] for start in starts if name in start.stages_s] for name in names}
    return {
        "serving_s": [round(start.serving_s, 2) for start in starts],
        "longest_silence_s": [round(start.longest_silence_s, 2) for start in starts],
        "stages_s": {name: statistics.median(seconds) for name, seconds in stages.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct, prepared once")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round; judges nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    model, rounds = options.model or ensure_default_model(), 1 if options.quick else options.rounds
    busy = busy_share()
    found = measure(model, options.adapters, rounds)
    gates = judge(found)
    result = {
        "starts": {name: _written(starts) for name, starts in found.items()},
        "gates": [asdict(gate) | {"passed": gate.passed} for gate in gates],
        "workload": {"model": model.name, "rounds": rounds, "quick": options.quick},
        "machine": facts() | {"busy_share_before": busy, "busy_share_after": busy_share()},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    show(gates)
    sys.exit(not options.quick and any(not gate.passed for gate in gates))


if __name__ == "__main__":
    main()
