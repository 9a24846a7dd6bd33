"""Proves, without a GPU, what the Triton kernels are for each one: compiles every variant and reads the binaries.

    python scripts/kernel_audit.py [--out FILE.json]

Prints registers, spills, shared memory, matrix instructions and load widths of each variant, and launches and bytes of
realistic steps beside those of the exact LoRA of rank k*r. Fails when a requirement does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from kernel_binary import DTYPES, TARGETS, Binary, compile_numbered, variants
from kernel_bytes import ADAPTERS, MODELS, SEGMENTS, Traffic, traffic
from rich.console import Console
from rich.table import Table

MAX_BYTES_OVER_MINIMUM = 1.1
MAX_LAUNCHES_PER_GROUP = 2
NOTES = """\
align is in elements; align 1 is for widths that break 16-byte loads (in/k or out/k no multiple of 8, of 4 in fp32).
u is the intermediate, a few hundred bytes per program. fp32 adapters compute in IEEE fp32, for which NVIDIA has no
matrix instruction. Bytes are of one layer, counted, not measured: "requested" counts what a cache serves again, "moved"
what memory itself does if it does; x is over the minimum (weights once, x once, y read and written). A long segment is
cut into tiles of 32 tokens, which ask for the same weights side by side: requested bytes are bounded for steps of
single tokens only. Without groups there would be 2 launches for each of the 7 projections."""
RESULT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "kernel-audit.json"


def main() -> None:
    """Compile, count, print, write; exit 1 if a requirement fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    binaries = compile_all()
    steps = count_all()
    problems = failures(binaries, steps)
    console = Console(width=160)
    console.print(binary_table(binaries), traffic_table(steps))
    console.print(NOTES)
    result = {
        "triton": triton.__version__,
        "failures": problems,
        "binaries": [asdict(binary) for binary in binaries],
        "steps": [asdict(step) for step in steps],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for problem in problems:
        console.print(f"[red]FAILED[/red] {problem}")
    sys.exit(1 if problems else 0)


def compile_all(dtypes: Sequence[torch.dtype] = DTYPES, targets: Sequence[str] = tuple(TARGETS)) -> list[Binary]:
    """Every variant of every kernel, for every target that it is launched on, on all cores."""
    wanted = [
        (dtype, i, target)
        for dtype in dtypes
        for target in targets
        for i, variant in enumerate(variants(dtype))
        if TARGETS[target].backend in variant.options
    ]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_numbered, *zip(*wanted, strict=True)))


def count_all() -> list[Traffic]:
    """Every model, step and adapter."""
    return [traffic(model, step, adapter) for model in MODELS for step in SEGMENTS for adapter in ADAPTERS]


def failures(binaries: Sequence[Binary], steps: Sequence[Traffic]) -> list[str]:
    """What does not hold, each with its values; empty if all is well."""
    found = [f"{_name(b)}: {problem}" for b in binaries for problem in _binary_failures(b)]
    used: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for b in binaries:
        if b.family:
            used.setdefault((b.target, b.dtype, b.family), set()).add(b.matrix_instructions)
    for (target, dtype, family), same in used.items():
        if len(same) > 1:  # then a token's sum would depend on how many tokens its adapter has in the step
            found.append(f"{target} {dtype}: {family} use different matrix instructions: {sorted(same)}")
    return found + [f"{s.model}, {s.segments}, {s.adapter}: {problem}" for s in steps for problem in _step_failures(s)]


def _step_failures(step: Traffic) -> list[str]:
    found = []
    limit = MAX_BYTES_OVER_MINIMUM * step.minimum
    if step.distinct > limit:
        found.append(f"moves {step.distinct} bytes, minimum {step.minimum}")
    if step.single_tokens and step.requested > limit:
        found.append(f"requests {step.requested} bytes, minimum {step.minimum}")
    if step.launches > MAX_LAUNCHES_PER_GROUP * step.groups:
        found.append(f"{step.launches} launches for {step.groups} groups")
    return found


def _binary_failures(binary: Binary) -> list[str]:
    found = []
    if binary.spilled_bytes:
        found.append(f"spills {binary.spilled_bytes} bytes")
    if binary.is_product and binary.dtype != "fp32" and not binary.matrix_instructions:
        found.append("uses no matrix instruction")
    narrow = {name: binary.load_bytes.get(name, 0) for name in binary.wide_loads}
    if narrow := {name: size for name, size in narrow.items() if size < 16}:
        found.append(f"loads of less than 16 bytes: {narrow}")
    return found


def _name(binary: Binary) -> str:
    return f"{binary.target} {binary.variant} {binary.dtype}"


def binary_table(binaries: Sequence[Binary]) -> Table:
    """One line per variant."""
    table = Table(title="binaries")
    for column in ("target", "variant", "dtype", "registers", "spilled B", "shared B", "matrix", "loads B"):
        table.add_column(column)
    for b in binaries:
        loads = ", ".join(f"{name[2:]} {size}" for name, size in sorted(b.load_bytes.items()))
        matrix = ", ".join(b.matrix_instructions) or "none"
        sizes = (b.registers, b.spilled_bytes, b.shared_bytes)
        table.add_row(b.target, b.variant, b.dtype, *map(str, sizes), matrix, loads)
    return table


def traffic_table(steps: Sequence[Traffic]) -> Table:
    """One line per model, step and adapter kind."""
    table = Table(title="launches and bytes of one layer, 16-bit weights")
    for column in ("model", "step", "adapter", "launches", "programs", "requested", "x", "moved", "x", "minimum"):
        table.add_column(column)
    for s in steps:
        table.add_row(
            s.model, s.segments, s.adapter, str(s.launches), f"{s.shrink_items} + {s.expand_items}",
            f"{s.requested / 1e6:.2f} MB", f"{s.requested / s.minimum:.2f}",
            f"{s.distinct / 1e6:.2f} MB", f"{s.distinct / s.minimum:.2f}", f"{s.minimum / 1e6:.2f} MB",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
