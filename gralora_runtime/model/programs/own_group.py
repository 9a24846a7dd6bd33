"""A layer whose adapters are applied by a call of their own, because few have any: who has one in a step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import GroupTable


class OwnGroup:
    """Of one layer. Its grouping is refilled by each step that has such adapters."""

    def __init__(self, table: GroupTable, max_rows: int) -> None:
        (self._module,) = table.modules
        self.table = table
        self._grouping = Grouping(max_rows)

    def grouped(self, slots: npt.NDArray[np.int32], used: npt.NDArray[np.int32]) -> Grouping | None:
        """Of rows that have these slots; None if none of `used`, which are theirs, has anything on this layer."""
        module = self._module
        adapted = module.host_index[used, :, 2].any(axis=1) | (module.host_affine[used] > 0)
        if not adapted.any():
            return None
        self._grouping.fill(slots, {slot: module.width(slot) for slot in used.tolist()})
        return self._grouping if self._grouping.num_adapted else None
