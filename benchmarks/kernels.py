"""The grouped adapter kernel alone, over all modules of a model as in a step: so many weights that no cache helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import starmap

import numpy as np
import torch
from numba import get_num_threads
from torch import Tensor

from benchmarks.cost import BYTES, FLOPS, Cost
from benchmarks.gate import GateRedError
from benchmarks.measurement import by_turns_s
from gralora_kernels.alignment import ALIGNMENT
from gralora_kernels.cpu import operations
from gralora_kernels.cpu.adapters import SCRATCH_BYTES
from gralora_kernels.cpu.linear import row_numbers
from gralora_kernels.cpu.threads import region_lock
from gralora_kernels.dispatch import resolve_backend
from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import Entry, GroupTable

CPU = torch.device("cpu")
Shape = tuple[int, tuple[int, ...]]  # of a group: in features, and the out features of the modules that read them


class KernelStep:
    """`num_adapters` adapters of one kind on groups of modules of the given shapes, with random weights."""

    def __init__(self, shapes: Sequence[Shape], *, num_adapters: int, rank: int, k: int) -> None:
        self._groups = [GroupTable(in_features, outs, num_adapters, CPU) for in_features, outs in shapes]
        self._num_adapters = num_adapters
        self._width = rank * k
        self._shared: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._params = rank * sum(t.in_features + t.out_features for group in self._groups for t in group.modules)
        self._arena = torch.randn(lay_out(self._groups, num_adapters, r=rank, k=k)) / 32

    def times_s(self, token_slots: Sequence[int], samples: int) -> dict[str, list[float]]:
        """Seconds of passes as one program, and of such as one call per group, by turns.

        `token_slots[t]` is the adapter of token t. Raises `GateRedError` if the two do not give the same bits.
        """
        works = {
            "one program": self._one_program(token_slots),
            f"{len(self._groups)} calls": self._calls(token_slots),
        }
        sums = []
        for work in works.values():
            for y in self._outputs(len(token_slots)):
                y.zero_()
            work()
            sums.append([y.clone() for y in self._outputs(len(token_slots))])
        if not all(starmap(torch.equal, zip(*sums, strict=True))) or not all(y.any() for y in sums[0]):
            raise GateRedError("adapters in one program do not give what they give in calls")
        return by_turns_s(works, samples)

    def _calls(self, token_slots: Sequence[int]) -> Callable[[], None]:
        backend, grouping = resolve_backend("cpu", CPU), self._grouping(token_slots)
        tensors = [self._tensors(group, len(token_slots)) for group in self._groups]

        def step() -> None:
            backend.prepare(self._groups, grouping)
            for group, (x, y) in zip(self._groups, tensors, strict=True):
                backend.apply(y, x, self._arena, group, grouping)

        return step

    def _one_program(self, token_slots: Sequence[int]) -> Callable[[], None]:
        """As in the engine's program, which has other operations between."""
        grouping, threads = self._grouping(token_slots), get_num_threads()
        tensors = [self._tensors(group, len(token_slots)) for group in self._groups]
        ops, rows = operations.adapters_alone(self._groups), operations.group_rows(self._groups)
        for i, (x, y) in enumerate(tensors):
            ops[2 * i : 2 * i + 2, [operations.X, operations.Y]] = x.data_ptr(), y.data_ptr()
        u = torch.zeros(grouping.num_adapted * rows.shape[1] * grouping.max_width)
        scratch = torch.zeros(threads * SCRATCH_BYTES, dtype=torch.uint8)
        fields = np.zeros(operations.NUM_STEP_FIELDS, np.int64)
        fields[operations.NUM_TOKENS] = grouping.num_tokens
        operations.set_adapters(fields, grouping, u, self._arena)
        reals, shape = np.zeros((len(ops), 2)), np.zeros(operations.NUM_SHAPE_FIELDS, np.int64)
        counters, iota = operations.new_counters(len(ops), threads), row_numbers(grouping.num_tokens)

        def step(_kept: object = (grouping, u)) -> None:  # `fields` has their addresses
            counters.fill(0)
            with region_lock:
                operations.run(
                    threads, ops, reals, rows, fields, shape, counters, scratch.data_ptr(), SCRATCH_BYTES, iota
                )

        return step

    def cost(self, token_slots: Sequence[int]) -> Cost:
        """Each adapter read once."""
        return Cost(BYTES * self._params * len(set(token_slots)), FLOPS * self._params * len(token_slots))

    def _grouping(self, token_slots: Sequence[int]) -> Grouping:
        grouping = Grouping(len(token_slots))
        grouping.fill(token_slots, dict.fromkeys(range(self._num_adapters), self._width))
        return grouping

    def _tensors(self, group: GroupTable, tokens: int) -> tuple[Tensor, Tensor]:
        """x and y: layers of one shape share theirs, as the engine's do."""
        key = (group.in_features, group.out_features, tokens)
        if key not in self._shared:
            self._shared[key] = torch.randn(tokens, group.in_features), torch.zeros(tokens, group.out_features)
        return self._shared[key]

    def _outputs(self, tokens: int) -> list[Tensor]:
        return [y for (_, _, count), (_, y) in self._shared.items() if count == tokens]


def lay_out(groups: Sequence[GroupTable], num_adapters: int, *, r: int, k: int) -> int:
    """Fill the tables as the loader does, one adapter after the other, first all A and then all B: elements taken."""
    tables = [table for group in groups for table in group.modules]
    size = 0
    for slot in range(num_adapters):
        offsets = []
        for features in (*(table.in_features for table in tables), *(table.out_features for table in tables)):
            offsets.append(size)
            size += -(-r * features // ALIGNMENT) * ALIGNMENT
        for table, a_offset, b_offset in zip(tables, offsets, offsets[len(tables) :], strict=False):
            table.set(slot, [Entry(a_offset=a_offset, b_offset=b_offset, r=r, k=k, scale=0.5)])
    return size
