"""`python -m benchmarks.tiles`: what decode steps' shrinks and expands take in other tiles, on this GPU.

All layers of an 8B model, r=16, each row another customer's, in one CUDA graph a kernel: what `FORMS` and `BLOCKING` of
`triton_ops/adapters/launch.py` are chosen from. Milliseconds, beside what their weights alone take to read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console

from benchmarks.gpu_check.clock import device, in_a_graph_ms
from benchmarks.gpu_check.facts import rates
from benchmarks.gpu_check.report import table
from benchmarks.loads import SHAPES
from gralora_kernels.alignment import ALIGNMENT
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import ARENA_SLACK, Entry, GroupTable
from gralora_kernels.triton_ops.adapters import launch
from gralora_kernels.triton_ops.adapters.launch import BLOCK_K_BYTES, BLOCK_N, BLOCKING, FORMS, Form, TritonBackend

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16
SHAPE, SLOTS, ROWS = ("llama-3-8b", 128, (1, 16, 64, 128)) if ON_GPU else ("tiny", 4, (1, 4))
RANK = 16
MAX_WIDTH = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """A choice. `shrink` and `expand`: the forms for tiles of one token."""

    depth: int = BLOCKING.depth
    block_k_bytes: int = BLOCK_K_BYTES
    block_n: int = BLOCK_N
    columns: int | None = None  # of all steps' items
    shrink: Form = FORMS["shrink", 1]
    expand: Form = FORMS["expand", 1]

    def __str__(self) -> str:
        usual = Tiles()
        names = [name for name in Tiles.__slots__ if getattr(self, name) != getattr(usual, name)]
        return ", ".join(f"{name} {getattr(self, name)}".replace("Form", "") for name in names) or "as served"

    def in_place(self) -> ExitStack:
        """While this is open, backends are made with them."""
        stack = ExitStack()
        blocking = replace(BLOCKING, depth=self.depth)
        if self.columns:
            blocking = replace(blocking, columns=self.columns, narrow_columns=self.columns)
        changed = {
            "BLOCKING": blocking,
            "BLOCK_K_BYTES": self.block_k_bytes,
            "BLOCK_N": self.block_n,
            "FORMS": FORMS | {("shrink", 1): self.shrink, ("expand", 1): self.expand},
        }
        for name, value in changed.items():
            stack.enter_context(patch.object(launch, name, value))
        launch.variant_of.cache_clear()
        stack.callback(launch.variant_of.cache_clear)
        return stack


CANDIDATES = {
    "shrink": [
        Tiles(),
        Tiles(shrink=Form(4, 3)),
        Tiles(shrink=Form(1, 4)),
        Tiles(block_k_bytes=512, shrink=Form(2, 3)),
        Tiles(depth=512),
    ],
    "expand": [
        Tiles(),
        Tiles(columns=128),
        Tiles(columns=256),
        Tiles(columns=512),
        Tiles(columns=1024),
        Tiles(columns=512, expand=Form(4, 4, 56)),
        Tiles(columns=512, expand=Form(2, 4)),
        Tiles(columns=512, block_n=256, expand=Form(4, 3)),
    ],
}


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", help="a file to write to")
    options = parser.parse_args()
    found = list(measure())
    columns = ("kernel", "k", "tiles", *(f"{rows} rows" for rows in ROWS))
    Console(width=150).print(table("milliseconds", found, columns))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


def measure() -> Iterator[dict[str, Any]]:
    """A line for each kernel, k and choice."""
    read_gb_s = rates()["read_gb_s"] if ON_GPU else 1.0
    for k in (4, 1):
        groups, arena = _adapters(k)
        for kernel, candidates in CANDIDATES.items():
            bytes_of_one = sum(
                RANK * (module.in_features if kernel == "shrink" else module.out_features) * DTYPE.itemsize
                for group in groups
                for module in group.modules
            )
            floors = {f"{rows} rows": round(rows * bytes_of_one / read_gb_s / 1e6, 3) for rows in ROWS}
            yield {"kernel": kernel, "k": k, "tiles": "floor"} | floors
            for tiles in candidates:
                with tiles.in_place():
                    times = _times(kernel, groups, arena, k)
                yield {"kernel": kernel, "k": k, "tiles": str(tiles)} | times


def _times(kernel: str, groups: Sequence[GroupTable], arena: torch.Tensor, k: int) -> dict[str, float]:
    backend = TritonBackend(device()).frozen(
        groups, max_tokens=max(ROWS), max_width=MAX_WIDTH, dtype=DTYPE, tile_tokens=1
    )
    times = {}
    for rows in ROWS:
        grouping = Grouping(rows)
        grouping.fill(np.arange(rows, dtype=np.int32), dict.fromkeys(range(SLOTS), RANK * k))
        backend.prepare(groups, grouping)
        tensors = {
            width: torch.randn(rows, width, device=device()).to(DTYPE)
            for group in groups
            for width in (group.in_features, group.out_features)
        }
        times[f"{rows} rows"] = round(in_a_graph_ms(partial(_all, kernel, backend, groups, arena, tensors)), 3)
    return times


def _all(
    kernel: str,
    backend: TritonBackend,
    groups: Sequence[GroupTable],
    arena: torch.Tensor,
    tensors: dict[int, torch.Tensor],
) -> None:
    for group in groups:
        if kernel == "shrink":
            backend.shrink(tensors[group.in_features], arena, group)
        else:
            backend.expand(tensors[group.out_features], arena, group)


def _adapters(k: int) -> tuple[list[GroupTable], torch.Tensor]:
    """Each layer's groups, and an arena in which no two adapters share an element."""
    shape, size, groups = SHAPES[SHAPE], 0, []
    kinds = [
        (shape.hidden, [shape.hidden, shape.kv, shape.kv]),
        (shape.hidden, [shape.hidden]),
        (shape.hidden, [shape.intermediate, shape.intermediate]),
        (shape.intermediate, [shape.hidden]),
    ]
    for in_features, outs in kinds * shape.layers:
        group = GroupTable(in_features, outs, SLOTS, device())
        for module in group.modules:
            for slot in range(SLOTS):
                a_offset, size = size, size + -(-RANK * in_features // ALIGNMENT) * ALIGNMENT
                b_offset, size = size, size + -(-RANK * module.out_features // ALIGNMENT) * ALIGNMENT
                module.set(slot, [Entry(a_offset=a_offset, b_offset=b_offset, r=RANK, k=k, scale=0.5)])
        groups.append(group)
    return groups, torch.empty(size + ARENA_SLACK, dtype=DTYPE, device=device()).normal_(0, 0.02)


if __name__ == "__main__":
    main()
