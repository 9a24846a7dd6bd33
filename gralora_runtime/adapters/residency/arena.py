"""Which ranges of the adapter arena are free. Counts elements; knows neither tensors nor adapters."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from gralora_kernels.alignment import ALIGNMENT, aligned


class ArenaAllocator:
    """Disjoint ranges of `numel` elements. Free neighbours are always one range; sizes round up to the alignment."""

    def __init__(self, numel: int) -> None:
        self.numel = numel // ALIGNMENT * ALIGNMENT
        self._free: list[tuple[int, int]] = [(0, self.numel)] if self.numel else []  # (offset, numel), by offset
        self._used: dict[int, int] = {}  # offset -> numel

    @property
    def free_numel(self) -> int:
        return sum(numel for _, numel in self._free)

    def free_ranges(self) -> Iterator[tuple[int, int]]:
        return iter(self._free)

    def find(self, numel: int) -> int | None:
        """The lowest free offset with so much room behind it, or None."""
        return next((offset for offset, room in self._free if room >= numel), None)

    def allocate(self, numel: int) -> int | None:
        """Take the first range that is large enough; None if there is none."""
        offset = self.find(numel)
        if offset is not None:
            self.allocate_at(offset, numel)
        return offset

    def allocate_at(self, offset: int, numel: int) -> None:
        """Take a range that the caller knows to be free."""
        assert offset % ALIGNMENT == 0, offset
        assert numel > 0, numel
        numel = aligned(numel)
        at = bisect_left(self._free, (offset + 1, 0)) - 1
        start, room = self._free[at] if at >= 0 else (0, 0)
        end = start + room
        assert start <= offset, f"[{offset}, +{numel}) is not free"
        assert offset + numel <= end, f"[{offset}, +{numel}) is not free"
        rest = [(start, offset - start), (offset + numel, end - offset - numel)]
        self._free[at : at + 1] = [piece for piece in rest if piece[1]]
        self._used[offset] = numel

    def free(self, offset: int) -> int:
        """Give back the range that begins at `offset`; returns its size."""
        assert offset in self._used, f"nothing is allocated at {offset}"
        numel = self._used.pop(offset)
        start, end = offset, offset + numel
        at = bisect_left(self._free, (offset, 0))
        if at < len(self._free) and self._free[at][0] == end:
            end += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == start:
            start = self._free.pop(at - 1)[0]
        insort(self._free, (start, end - start))
        return numel

    def check_integrity(self) -> None:
        """Free and used ranges cover the arena without overlap, and no two free ranges touch."""
        position = 0
        was_free = False
        for offset, numel, is_free in sorted(
            [(*piece, True) for piece in self._free] + [(*piece, False) for piece in self._used.items()]
        ):
            assert offset == position, f"gap or overlap at {position}: next range begins at {offset}"
            assert numel > 0, f"empty range at {offset}"
            assert not (was_free and is_free), f"two free ranges touch at {offset}"
            position, was_free = offset + numel, is_free
        assert position == self.numel, f"the ranges end at {position} of {self.numel}"
