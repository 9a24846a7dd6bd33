"""Runs the parts, each in a process of its own, prints a table that fits a screen and writes one JSON file.

    make gpu-check                     on a machine with a GPU, under six minutes
    make gpu-check CHECK=--dry         on any: tiny shapes, Triton's interpreter; its times mean nothing
    PYTHONPATH=kernels:.:server:proto python -m benchmarks.gpu_check [--dry] [--only PART,...] [--out DIR]

A part's log is kept whole, below --out or in the folder that is printed. Exit code 1 if a check or a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.report import print_result

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
# Parts that run side by side, one stage after the other; what is timed runs alone. By part: seconds, six minutes in
# all. Compiling takes most of the checks'. What a part has found until then is kept.
STAGES = (
    {"facts": 30},
    {"kernels-float32": 110, "kernels-float16": 110, "kernels-bfloat16": 110, "programs": 110, "tests": 110},
    {"steps": 110},
    {"served": 60},
    {"attention": 25},
    {"loads": 35},
    {"transformers": 50},
)
DRY_TIMES = 3  # the interpreter takes longer
LOG_COLUMNS = 160  # of a line that is printed; the file has all of it
Line = dict[str, Any]


def main() -> None:
    """Parse, run, report, exit."""
    parser = argparse.ArgumentParser(description="Whether this machine's GPU is right, and how fast it is.")
    parser.add_argument("--dry", action="store_true", help="tiny shapes under Triton's interpreter, without a GPU")
    parser.add_argument("--out", type=Path, help=f"where the JSON goes; default: {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--only", default="", help="parts, separated by commas; default: all")
    options = parser.parse_args()
    parts = [part for stage in STAGES for part in stage]
    only = ["facts", *options.only.split(",")] if options.only else parts
    if unknown := [part for part in only if part not in {"facts", *parts}]:
        parser.error(f"--only: there is no part {', '.join(unknown)}; there are {', '.join(parts)}")
    logs = options.out.resolve() / "logs" if options.out else Path(tempfile.mkdtemp(prefix="gpu-check-"))
    logs.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = []
    for stage in STAGES:
        machine = next((line for line in lines if line["what"] == "facts"), {})
        run = partial(run_part, logs=logs, dry=options.dry, machine=machine)
        with ThreadPoolExecutor() as side_by_side:
            limits = {part: limit_s for part, limit_s in stage.items() if part in only}
            for found in side_by_side.map(run, limits, limits.values()):
                lines += found
    result = gather(lines, dry=options.dry)
    out = options.out or (logs if options.dry else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", str(result["machine"].get("gpu", "no-gpu")).lower()).strip("-")
    file = out / f"{datetime.now(UTC):%Y-%m-%d-%H%M}-{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print_result(result)
    print(f"\n{file}\nlogs: {logs}")
    sys.exit(0 if all(check["passed"] for check in result["checks"]) else 1)


def run_part(part: str, limit_s: int, *, logs: Path, dry: bool, machine: Line) -> list[Line]:
    """What a part said; if it failed as a whole, that is a check that did not pass."""
    limit_s, log, found = limit_s * (DRY_TIMES if dry else 1), logs / f"{part}.log", logs / f"{part}.jsonl"
    found.unlink(missing_ok=True)  # of an earlier run
    started_s = time.monotonic()
    with log.open("w") as opened:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.gpu_check.part", part, json.dumps(machine), str(found)],
                stdout=opened, stderr=subprocess.STDOUT, timeout=limit_s, env=_environment(logs, dry=dry), cwd=ROOT,
                check=False,
            )  # fmt: skip
            problem = "" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"took more than {limit_s} s"
    lines = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    end = "\n".join(line[:LOG_COLUMNS] for line in log.read_text().splitlines()[-15:]) + "\n" if problem else ""
    print(f"{end}{part}: {problem or 'ended'}, {time.monotonic() - started_s:.0f} s", flush=True)
    lines.append({"what": "check", "name": f"part {part}", "passed": not problem, "detail": problem or "ended"})
    return lines


def gather(lines: list[Line], *, dry: bool) -> Line:
    """The file's contents."""

    def of(what: str) -> list[Line]:
        return [{key: value for key, value in line.items() if key != "what"} for line in lines if line["what"] == what]

    return {
        "dry": dry,
        "machine": next(iter(of("facts")), {}),
        "checks": of("check"),
        "cases": of("step"),
        "served": of("served"),
        "transformers": of("transformers"),
        "prefill": of("prefill"),
        "kernels": of("kernels"),
        "attention": of("attention"),
        "loads": next(iter(of("loads")), {}),
        "graphs": {line["shape"]: line for line in of("graphs")},
        "skipped": of("skipped"),
    }


def _environment(folder: Path, *, dry: bool) -> dict[str, str]:
    paths = [ROOT / "kernels", ROOT, ROOT / "server", ROOT / "proto", *map(Path, filter(None, sys.path))]
    try:
        version("gralora-server")
    except PackageNotFoundError:  # the engine asks for its own version
        info = folder / "gralora_server-0.0.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gralora-server\nVersion: 0.0.0\n")
        paths.append(folder)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return environment | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else environment


if __name__ == "__main__":
    main()
