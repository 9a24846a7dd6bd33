"""Which tokens of a step go to which adapter slot. Built once per step, shared by all layers; knows no weights.

Example, with tiles of 2 tokens (the real tile is `TILE_TOKENS`), for `token_slots = [7, -1, 3, 7, 7]`:

    order    [2, 0, 3, 4]            token indices, sorted by slot and stable within one; base-model tokens left out
    starts   [0, 1, 4]               segment i is order[starts[i]:starts[i + 1]]
    slots    [3, 7]                  the slot of each segment
    items    [[3, 0, 1],             work: (slot, first position in order, number of tokens); a segment longer than a
              [7, 1, 2],             tile is cut, so that a launch has exactly as many programs as there is work
              [7, 3, 1]]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

TILE_TOKENS = 32  # one adapter's weights are read once per so many tokens


class Grouping:
    """Preallocated for `max_tokens` and refilled in place. The arrays are views, valid until the next `fill`."""

    def __init__(self, max_tokens: int, *, tile_tokens: int = TILE_TOKENS) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.max_width = 0  # columns of u that one module needs, over the slots of this step
        self.max_item_tokens = 0
        self.order: npt.NDArray[np.int32] = np.zeros(0, np.int32)  # [num_adapted]
        self.starts: npt.NDArray[np.int32] = np.zeros(1, np.int32)  # [num_segments + 1]
        self.slots: npt.NDArray[np.int32] = np.zeros(0, np.int32)  # [num_segments]
        self.items: npt.NDArray[np.int32] = np.zeros((0, 3), np.int32)  # [num_items, 3]
        self._tile_tokens = tile_tokens
        self._order_buffer: npt.NDArray[np.int32] = np.zeros(max_tokens, np.int32)
        self._item_buffer: npt.NDArray[np.int32] = np.zeros((max_tokens, 3), np.int32)

    @property
    def num_adapted(self) -> int:
        """Tokens that have an adapter."""
        return len(self.order)

    @property
    def num_segments(self) -> int:
        """Adapter slots in use."""
        return len(self.slots)

    @property
    def num_items(self) -> int:
        """Pieces of work: (slot, token tile)."""
        return len(self.items)

    def fill(self, token_slots: Sequence[int] | npt.NDArray[np.int32], slot_widths: Mapping[int, int]) -> None:
        """`token_slots[t]` is the pool slot of token t, or -1 for the base model; tokens come in any order."""
        slots = np.asarray(token_slots, np.int32)
        if len(slots) > self.max_tokens:
            raise ValueError(f"a step of {len(slots)} tokens does not fit into a grouping for {self.max_tokens}")
        self.num_tokens = len(slots)
        ranked = np.argsort(slots, kind="stable").astype(np.int32)
        ranked = ranked[np.searchsorted(slots[ranked], 0) :]
        self.order = self._order_buffer[: len(ranked)]
        self.order[:] = ranked
        self.slots, first = np.unique(slots[ranked], return_index=True)
        self.starts = np.append(first, len(ranked)).astype(np.int32)
        self._fill_items()
        self.max_width = max((slot_widths[slot] for slot in self.slots.tolist()), default=0)

    def _fill_items(self) -> None:
        lengths = self.starts[1:] - self.starts[:-1]
        tiles = -(-lengths // self._tile_tokens)
        segment = np.repeat(np.arange(len(tiles)), tiles)  # [items]
        number = np.arange(len(segment)) - (tiles.cumsum() - tiles)[segment]  # of a tile in its segment
        self.items = self._item_buffer[: len(segment)]
        self.items[:, 0] = self.slots[segment]
        self.items[:, 1] = self.starts[:-1][segment] + number * self._tile_tokens
        self.items[:, 2] = np.minimum(self._tile_tokens, self.starts[1:][segment] - self.items[:, 1])
        self.max_item_tokens = int(self.items[:, 2].max(initial=0))
