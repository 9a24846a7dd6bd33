"""How a backend wants an adapter's two matrices to lie in the arena. Knows numpy arrays, no checkpoint and no pool.

Row-major (`panel` 0) is `Ap [r, in]` and `Bp [r, out]`. A backend that multiplies panels of columns wants, for each of
the k blocks, its matrix (`A_n [in/k, r]`, `B_j [r, out/k]`) cut into panels of at most `panel` columns, each of them
contiguous: then it reads an adapter from front to back. Both take exactly r * in and r * out elements.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

SHA256_BYTES = 32
Array = npt.NDArray[Any]  # elements are moved, never read


class Place(IntEnum):
    """Columns of a table that says, row by row, where a matrix is and where it goes. Offsets are in elements."""

    SOURCE = 0
    TARGET = 1
    BLOCKS = 2
    DEPTH = 3
    COLUMNS = 4  # of a block
    IS_TRANSPOSED = 5  # a plain pair's, which is one block [columns, depth]


class PlaceMany(Protocol):
    """`place_a` and `place_b` of many matrices at once, whose elements stay as they are."""

    def __call__(self, out: Array, values: Array, places: Array, /) -> Array:
        """From flat `values` to flat `out`, both unsigned integers, as int64 `places` [matrices, len(Place)] say.

        Returns of each matrix the largest of its elements without their sign: it is their largest magnitude, as bits.
        """


class HashMany(Protocol):
    """SHA-256 of many stretches of memory at once."""

    def __call__(self, data: Array, spans: Array, /) -> Array:
        """Digests, uint8 [spans, 32], of uint8 `data` [begin:end] for each of int64 `spans` [spans, 2]."""


def hash_each(data: Array, spans: Array) -> Array:
    """A `HashMany` over hashlib, which lets go of the interpreter lock and takes it again for each stretch."""
    digests = b"".join(hashlib.sha256(data[begin:end].data).digest() for begin, end in spans.tolist())
    return np.frombuffer(digests, np.uint8).reshape(-1, SHA256_BYTES)


@dataclass(frozen=True, slots=True)
class Packing:
    """`panel`: columns of a panel, 0 for row-major. `keeps_16_bit`: in an arena of fp32 too, such matrices stay so.

    What is fast and lets go of the interpreter lock is for a backend to bring: `place_many`, for panels of its own, and
    `hash_many`, for what a reader does beside it.
    """

    panel: int = 0
    keeps_16_bit: bool = False
    place_many: PlaceMany | None = field(default=None, repr=False)
    hash_many: HashMany = field(default=hash_each, repr=False)


ROW_MAJOR = Packing()


def place_a(out: Array, blocks: Array, panel: int) -> None:
    """A [k, in/k, r] into `out`, flat [r * in]."""
    if panel:
        _place_panels(out, blocks, panel)
    else:
        _assign(out, blocks.transpose(2, 0, 1))


def place_b(out: Array, blocks: Array, panel: int) -> None:
    """B [k, r, out/k] into `out`, flat [r * out]."""
    if panel:
        _place_panels(out, blocks, panel)
    else:
        _assign(out, blocks.transpose(1, 0, 2))


def blocks_a(placed: Array, k: int, r: int, panel: int) -> Array:
    """A [k, in/k, r] of what `place_a` made, a copy."""
    if panel:
        return _blocks_of_panels(placed, k, len(placed) // (k * r), r, panel)
    return np.ascontiguousarray(placed.reshape(r, k, -1).transpose(1, 2, 0))


def blocks_b(placed: Array, k: int, r: int, panel: int) -> Array:
    """B [k, r, out/k] of what `place_b` made, a copy."""
    if panel:
        return _blocks_of_panels(placed, k, r, len(placed) // (k * r), panel)
    return np.ascontiguousarray(placed.reshape(r, k, -1).transpose(1, 0, 2))


def _place_panels(out: Array, blocks: Array, panel: int) -> None:
    """blocks [k, depth, columns]: of each block all whole panels at once, [panels, depth, panel], then the rest."""
    k, depth, columns = blocks.shape
    whole = columns - columns % panel
    by_block = out.reshape(k, depth * columns)
    if whole:
        panels = by_block[:, : depth * whole].reshape(k, -1, depth, panel)
        panels[:] = blocks[:, :, :whole].reshape(k, depth, -1, panel).transpose(0, 2, 1, 3)
    if whole < columns:
        by_block[:, depth * whole :].reshape(k, depth, -1)[:] = blocks[:, :, whole:]


def _blocks_of_panels(placed: Array, k: int, depth: int, columns: int, panel: int) -> Array:
    """Blocks [k, depth, columns]."""
    blocks: Array = np.empty((k, depth, columns), placed.dtype)
    by_block = placed.reshape(k, depth * columns)
    starts = range(0, columns, panel)
    for start, panel_of_all in zip(starts, np.split(by_block, [depth * start for start in starts][1:], 1), strict=True):
        blocks[:, :, start : start + panel] = panel_of_all.reshape(k, depth, -1)
    return blocks


def _assign(out: Array, matrix: Array) -> None:
    out.reshape(matrix.shape)[:] = matrix
