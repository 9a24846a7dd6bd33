"""How many bytes a step's adapters move, counted from the work lists that the kernels are launched with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import ENTRIES, Entry, GroupTable
from gralora_kernels.triton_ops.adapters.launch import BLOCKING
from gralora_kernels.work import ITEM, StepWork, plan_work

ELEMENT = 2  # bytes: bf16 or fp16
U_ELEMENT = 4  # fp32
LAUNCHES_PER_GROUP = 2

# Groups of one layer: in_features, and out_features of the modules that read the same input.
MODELS: dict[str, list[tuple[int, list[int]]]] = {
    "SmolLM2-135M": [(576, [576, 192, 192]), (576, [576]), (576, [1536, 1536]), (1536, [576])],
    "Llama-3-8B": [(4096, [4096, 1024, 1024]), (4096, [4096]), (4096, [14336, 14336]), (14336, [4096])],
}
SEGMENTS = {"16 segments of 1 token": [1] * 16, "1 segment of 256 tokens": [256]}  # each its own adapter
RANK, BLOCKS = 16, 2
ADAPTERS = {
    f"GraLoRA r={RANK} k={BLOCKS}": (RANK, BLOCKS),
    f"exact LoRA r={RANK * BLOCKS}": (RANK * BLOCKS, 1),  # the same update, as other servers must store it
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One layer of one step, in bytes."""

    model: str
    segments: str
    adapter: str
    single_tokens: bool
    groups: int
    launches: int
    shrink_items: int
    expand_items: int
    requested: int  # what the programs ask for, served by the L2 cache where they ask twice
    distinct: int  # what memory itself moves: every byte that is asked for twice is asked for by neighbours
    minimum: int  # weights once, x once, y read and written


def traffic(model: str, segments: str, adapter: str) -> Traffic:
    """Of one layer's groups, for the case of these names."""
    counts = SEGMENTS[segments]
    groups = [_group(in_features, outs, len(counts), *ADAPTERS[adapter]) for in_features, outs in MODELS[model]]
    grouping = Grouping(sum(counts))
    slots = np.repeat(np.arange(len(counts)), counts)
    grouping.fill(slots, dict.fromkeys(range(len(counts)), 1))
    work = plan_work(groups, grouping, BLOCKING)
    figures = [_group_bytes(group, work, i, len(slots)) for i, group in enumerate(groups)]
    return Traffic(
        model=model,
        segments=segments,
        adapter=adapter,
        single_tokens=max(counts) == 1,
        groups=len(groups),
        launches=LAUNCHES_PER_GROUP * len(groups),
        shrink_items=sum(part.num_shrink_items for part in work.groups),
        expand_items=sum(part.num_expand_items for part in work.groups),
        requested=sum(requested for requested, _, _ in figures),
        distinct=sum(distinct for _, distinct, _ in figures),
        minimum=sum(minimum for _, _, minimum in figures),
    )


def _group(in_features: int, outs: Sequence[int], num_slots: int, r: int, k: int) -> GroupTable:
    group = GroupTable(in_features, outs, num_slots, torch.device("cpu"))
    for table in group.modules:
        for slot in range(num_slots):
            table.set(slot, [Entry(a_offset=0, b_offset=0, r=r, k=k, scale=1.0)])
    return group


def _group_bytes(group: GroupTable, work: StepWork, position: int, num_tokens: int) -> tuple[int, int, int]:
    """(requested, distinct, minimum)."""
    part = work.groups[position]
    shrink = work.items[part.shrink_start :][: part.num_shrink_items].astype(np.int64)
    expand = work.items[part.expand_start :][: part.num_expand_items].astype(np.int64)
    entries = group.host_index.reshape(-1, 4)  # by the row that an item names
    lists = (ITEM * 4 + 4) * (len(shrink) + len(expand)) + 32 * len(shrink) + 32 * ENTRIES * len(expand)

    count, begin = shrink[:, 2], shrink[:, 6]
    rank, k = entries[shrink[:, 0], 2], entries[shrink[:, 0], 3]
    depth = group.in_features // k - begin
    if work.is_split:
        depth = np.minimum(depth, BLOCKING.depth)
    rank_rows = np.minimum(rank - shrink[:, 4], BLOCKING.rank_rows)
    x_read, a_read = int((count * depth).sum()), int((rank_rows * depth).sum())
    u_written = int((count * rank_rows).sum())

    count, columns = expand[:, 2], expand[:, 4] - expand[:, 3]
    rank_sum = u_sum = np.zeros(len(expand), np.int64)
    for rows in (expand[:, 0] + i for i in range(ENTRIES)):
        rank, k = entries[rows, 2], np.maximum(entries[rows, 3], 1)
        planes = -(-(group.in_features // k) // BLOCKING.depth) if work.is_split else 1
        rank_sum, u_sum = rank_sum + rank, u_sum + rank * planes
    u_read, b_read = int((count * u_sum).sum()), int((rank_sum * columns).sum())
    y_moved = 2 * int((count * columns).sum())

    ranks = group.host_index[..., 2].sum(axis=(1, 2)).tolist()
    weights = sum(r * (t.in_features + t.out_features) for r, t in zip(ranks, group.modules, strict=True))
    minimum = ELEMENT * (num_tokens * group.in_features + weights + y_moved)
    requested = ELEMENT * (x_read + a_read + b_read + y_moved) + U_ELEMENT * (u_written + u_read) + lists
    return requested, minimum + U_ELEMENT * 2 * u_written + lists, minimum
