"""The "cpu" backend: what adapters add to one group of linear layers, as one call.

Models of Llama's build do not need it: their adapters are operations among others (`program.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numba import get_num_threads
from torch import Tensor

from gralora_kernels.cpu import operations
from gralora_kernels.cpu.adapters import SCRATCH_BYTES
from gralora_kernels.cpu.embedding import look_up
from gralora_kernels.cpu.linear import row_numbers
from gralora_kernels.cpu.microkernel import PANEL
from gralora_kernels.cpu.placing import place_panels
from gralora_kernels.cpu.sha256 import sha256_of_each
from gralora_kernels.cpu.threads import region_lock
from gralora_kernels.grouping import Grouping
from gralora_kernels.packing import Packing
from gralora_kernels.tables import GroupTable

# Below so many multiply-adds (an upper bound) one thread is done sooner than two have met: about 15 us on Zen 4.
SERIAL_WORK = 200_000


@dataclass(frozen=True, slots=True)
class _Operations:
    """Shrink and expand of one group; `table` gets the addresses of x and y at each call."""

    table: npt.NDArray[np.int64]
    group_rows: npt.NDArray[np.int64]

    @classmethod
    def of(cls, group: GroupTable) -> _Operations:
        return cls(operations.adapters_alone([group]), operations.group_rows([group]))


class CpuBackend:
    """fp32, but for adapters of 16 bits. Holds the intermediate u, so calls take turns."""

    name = "cpu"
    packing = Packing(panel=PANEL, keeps_16_bit=True, place_many=place_panels, hash_many=sha256_of_each)

    def __init__(self) -> None:
        self._u = torch.empty(0)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._reals = np.zeros((2, 2))
        self._shape = np.zeros(operations.NUM_SHAPE_FIELDS, np.int64)
        self._counters = operations.new_counters(2, 0)
        self._operations: dict[GroupTable, _Operations] = {}
        self._lock = threading.Lock()

    def prepare(self, groups: Sequence[GroupTable], grouping: Grouping) -> None:
        """The kernels read the grouping itself."""

    def apply(self, y: Tensor, x: Tensor, arena: Tensor, group: GroupTable, grouping: Grouping) -> None:
        """y [tokens, sum(out)] += adapter(x [tokens, in]) for the tokens that have an adapter."""
        if not grouping.num_adapted:
            return
        _check(y, (grouping.num_tokens, group.out_features))
        _check(x, (grouping.num_tokens, group.in_features))
        if arena.dtype != torch.float32:
            raise ValueError(f"the cpu backend needs a float32 arena, got {arena.dtype}")
        work = grouping.num_adapted * grouping.max_width * (group.in_features + group.out_features)
        parts = 1 if work <= SERIAL_WORK else get_num_threads()
        with self._lock, region_lock:
            self._reserve(grouping.num_adapted * len(group.modules) * grouping.max_width, parts)
            own = self._operations_of(group)
            own.table[:, [operations.X, operations.Y]] = x.data_ptr(), y.data_ptr()
            step = np.zeros(operations.NUM_STEP_FIELDS, np.int64)
            step[operations.NUM_TOKENS] = grouping.num_tokens
            operations.set_adapters(step, grouping, self._u, arena)
            self._counters.fill(0)
            operations.run(
                parts, own.table, self._reals, own.group_rows, step, self._shape, self._counters,
                self._scratch.data_ptr(), SCRATCH_BYTES, row_numbers(grouping.num_tokens),
            )  # fmt: skip

    def look_up(
        self, y: Tensor, ids: Tensor, arena: Tensor, group: GroupTable, grouping: Grouping, *, factor: float
    ) -> None:
        """See `AdapterBackend`."""
        _check(y, (grouping.num_tokens, group.out_features))
        if ids.shape != (grouping.num_tokens,) or ids.dtype != torch.int64 or not ids.is_contiguous():
            raise ValueError(f"the cpu backend needs contiguous int64 ids ({grouping.num_tokens},), got {ids.shape}")
        look_up(y, ids, arena, group, grouping, factor=factor)

    def _operations_of(self, group: GroupTable) -> _Operations:
        if group not in self._operations:
            self._operations[group] = _Operations.of(group)
        return self._operations[group]

    def _reserve(self, numel: int, parts: int) -> None:
        if self._u.numel() < numel:
            self._u = torch.empty(numel)
        if self._scratch.numel() < parts * SCRATCH_BYTES:
            self._scratch = torch.empty(parts * SCRATCH_BYTES, dtype=torch.uint8)
            self._counters = operations.new_counters(2, parts)


def _check(tensor: Tensor, shape: tuple[int, int]) -> None:
    """The kernel reads raw addresses: what it assumes about a tensor is checked here."""
    if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(
            f"the cpu backend needs contiguous float32 {shape}, got {tensor.dtype} {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )
