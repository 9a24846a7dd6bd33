"""Adapters on a mixture's experts, as kernels see them: each expert's pair is an adapter of its own. Knows no router.

A parameter that holds all experts' matrices is one module of the pool, whose entry says where the first expert's pair
lies. The others' follow, each matrix at a multiple of `ALIGNMENT`. For rows that went to experts, a table is filled
with one line for each expert of each adapter that some of them want.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from gralora_kernels.alignment import ALIGNMENT
from gralora_kernels.tables import GroupTable, ModuleTable, Storage

Ints = npt.NDArray[np.integer]


class ExpertTable:
    """Of one parameter, refilled for each layer of a step. `group` is what kernels are given."""

    def __init__(self, in_features: int, out_features: int, max_lines: int, device: torch.device) -> None:
        self.group = GroupTable(in_features, [out_features], max_lines, device)
        self._shared = device.type == "cpu"

    def fill(self, stacked: ModuleTable, slots: Ints, experts: Ints) -> npt.NDArray[np.int64]:
        """Line i is what slot `slots[i]` of the pool's table holds for expert `experts[i]`. Returns their widths."""
        group, count = self.group, len(slots)
        index = stacked.host_index[slots]  # [lines, ENTRIES, 4], a copy
        storage = stacked.host_storage[slots]
        per_element = np.where(storage == Storage.NATIVE, 1, 2)
        for column, features in enumerate((stacked.in_features, stacked.out_features)):
            numel = -(-index[..., 2] * features // per_element)
            index[..., column] += experts[:, None] * (-(-numel // ALIGNMENT) * ALIGNMENT)
        rows = group.rows
        rows.host_index[0, :count] = index
        rows.host_scale[0, :count] = stacked.host_scale[slots]
        rows.host_storage[0, :count] = storage
        group.layouts[:count] = [stacked.group.layouts[slot] for slot in slots.tolist()]
        rows.versions[:count] += 1
        if not self._shared:
            rows.index[0, :count].copy_(torch.from_numpy(rows.host_index[0, :count]))
            rows.scale[0, :count].copy_(torch.from_numpy(rows.host_scale[0, :count]))
        widths: npt.NDArray[np.int64] = (index[..., 2] * index[..., 3]).sum(axis=1)
        return widths
