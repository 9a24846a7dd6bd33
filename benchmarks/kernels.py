"""The grouped adapter kernel alone, over all modules of a model as in a step: so many weights that no cache helps."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from benchmarks.cost import BYTES, FLOPS, Cost
from gralora_kernels.dispatch import resolve_backend
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import ALIGNMENT, Entry, GroupTable

CPU = torch.device("cpu")
Shape = tuple[int, tuple[int, ...]]  # of a group: in features, and the out features of the modules that read them


class KernelStep:
    """`num_adapters` adapters of one kind on groups of modules of the given shapes, with random weights."""

    def __init__(self, shapes: Sequence[Shape], *, num_adapters: int, rank: int, k: int) -> None:
        self._backend = resolve_backend("cpu", CPU)
        self._groups = [GroupTable(in_features, outs, num_adapters, CPU) for in_features, outs in shapes]
        self._num_adapters = num_adapters
        self._width = rank * k
        tables = [table for group in self._groups for table in group.modules]
        size = 0
        for slot in range(num_adapters):
            for table in tables:
                b_offset = aligned(size + rank * table.in_features)
                table.set(slot, [Entry(a_offset=size, b_offset=b_offset, r=rank, k=k, scale=1.0)])
                size = aligned(b_offset + rank * table.out_features)
        self._params = rank * sum(table.in_features + table.out_features for table in tables)  # of one adapter
        self._arena = torch.randn(size) / 32

    def times_s(self, token_slots: Sequence[int], samples: int) -> list[float]:
        """Seconds for one pass over all groups; `token_slots[t]` is the adapter of token t."""
        grouping = Grouping(len(token_slots))
        grouping.fill(token_slots, dict.fromkeys(range(self._num_adapters), self._width))
        inputs = {group.in_features: torch.randn(len(token_slots), group.in_features) for group in self._groups}
        outputs = {group.out_features: torch.zeros(len(token_slots), group.out_features) for group in self._groups}
        times = []
        for _ in range(samples + 2):
            started_s = time.perf_counter()
            self._backend.prepare(self._groups, grouping)
            for group in self._groups:
                x, y = inputs[group.in_features], outputs[group.out_features]
                self._backend.apply(y, x, self._arena, group, grouping)
            times.append(time.perf_counter() - started_s)
        return times[2:]

    def cost(self, token_slots: Sequence[int]) -> Cost:
        """Each adapter read once."""
        return Cost(BYTES * self._params * len(set(token_slots)), FLOPS * self._params * len(token_slots))


def aligned(offset: int) -> int:
    """Where the next matrix may begin."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
