"""Run as a program: loads every adapter directory below one, and prints what each took. One JSON line a directory.

A process of its own, because the largest memory that it ever took is only told of a whole process.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.errors import AdapterRejectedError

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """Largest resident memory since the last reset."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    RESET.write_text("5")


def measure(folder: Path, modules: list[ModuleShape]) -> dict[str, object]:
    import torch

    from gralora_runtime.adapters.checkpoint.loader import load

    reset_peak()
    before_bytes, started_s = peak_bytes(), time.process_time()
    try:
        load(folder.name, folder, modules, torch.float32, max_width=256, roots=(folder.parent,))
        refused = ""
    except AdapterRejectedError as error:
        refused = str(error)
    return {
        "name": folder.name,
        "refused": refused,
        "processor_s": time.process_time() - started_s,
        "memory_bytes": peak_bytes() - before_bytes,
    }


def main(root: str, modules_file: str) -> None:
    modules = [ModuleShape(*shape) for shape in json.loads(Path(modules_file).read_text())]
    for folder in sorted(Path(root).iterdir()):
        print(json.dumps(measure(folder, modules)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
