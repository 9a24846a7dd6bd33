"""The grouped adapter kernel alone, over all modules of a model as in a step: so many weights that no cache helps."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.cost import BYTES, FLOPS, Cost
from gralora_kernels.dispatch import AdapterBackend, resolve_backend
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import ALIGNMENT, Entry, ModuleTable

CPU = torch.device("cpu")
Shape = tuple[int, int]  # in, out features


class KernelStep:
    """`num_adapters` adapters of one kind on modules of the given shapes, with random weights."""

    def __init__(self, shapes: Sequence[Shape], *, num_adapters: int, rank: int, k: int) -> None:
        self._backend = resolve_backend("cpu", CPU)
        self._tables = [ModuleTable(*shape, num_adapters, CPU) for shape in shapes]
        self._num_adapters = num_adapters
        self._width = rank * k
        size = 0
        for slot in range(num_adapters):
            for table in self._tables:
                b_offset = aligned(size + rank * table.in_features)
                table.set(slot, [Entry(a_offset=size, b_offset=b_offset, r=rank, k=k, scale=1.0)])
                size = aligned(b_offset + rank * table.out_features)
        self._params = rank * sum(sum(shape) for shape in shapes)  # of one adapter
        self._arena = torch.randn(size) / 32

    def times_s(self, token_slots: Sequence[int], samples: int) -> list[float]:
        """Seconds for one pass over all modules; `token_slots[t]` is the adapter of token t."""
        grouping = Grouping(len(token_slots))
        grouping.fill(token_slots, dict.fromkeys(range(self._num_adapters), self._width))
        inputs = {table.in_features: torch.randn(len(token_slots), table.in_features) for table in self._tables}
        outputs = {table.out_features: torch.zeros(len(token_slots), table.out_features) for table in self._tables}
        times = []
        for _ in range(samples + 2):
            started_s = time.perf_counter()
            for table in self._tables:
                x, y = inputs[table.in_features], outputs[table.out_features]
                apply_adapters(self._backend, y, x, (self._arena, table, grouping))
            times.append(time.perf_counter() - started_s)
        return times[2:]

    def cost(self, token_slots: Sequence[int]) -> Cost:
        """Each adapter read once."""
        return Cost(BYTES * self._params * len(set(token_slots)), FLOPS * self._params * len(token_slots))


def apply_adapters(
    backend: AdapterBackend, y: Tensor, x: Tensor, adapters: tuple[Tensor, ModuleTable, Grouping]
) -> None:
    """The only call of the kernel's interface in these benchmarks."""
    arena, table, grouping = adapters
    backend.prepare([table.group], grouping)
    backend.apply(y, x, arena, table.group, grouping)


def aligned(offset: int) -> int:
    """Where the next matrix may begin."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
