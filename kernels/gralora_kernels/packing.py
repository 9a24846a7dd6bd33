"""How a backend wants an adapter's two matrices to lie in the arena. Knows numpy arrays, no checkpoint and no pool.

Row-major (`panel` 0) is `Ap [r, in]` and `Bp [r, out]`. A backend that multiplies panels of columns wants, for each of
the k blocks, its matrix (`A_n [in/k, r]`, `B_j [r, out/k]`) cut into panels of at most `panel` columns, each of them
contiguous: then it reads an adapter from front to back. Both take exactly r * in and r * out elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def arrange_a(a: Array, k: int, panel: int) -> Array:
    """`Ap [r, in]` -> flat [r * in]."""
    blocks = a.reshape(a.shape[0], k, -1).transpose(1, 2, 0)  # [k, in/k, r]
    return _arranged(blocks, panel) if panel else a.reshape(-1)


def arrange_b(b: Array, k: int, panel: int) -> Array:
    """`Bp [r, out]` -> flat [r * out]."""
    blocks = b.reshape(b.shape[0], k, -1).transpose(1, 0, 2)  # [k, r, out/k]
    return _arranged(blocks, panel) if panel else b.reshape(-1)


def _arranged(blocks: Array, panel: int) -> Array:
    """blocks [k, depth, columns]."""
    if blocks.shape[2] <= panel:
        return blocks.reshape(-1)
    return np.concatenate([part.reshape(-1) for block in blocks for part in _panels(block, panel)])


def _panels(block: Array, panel: int) -> Iterator[Array]:
    """All whole panels at once, [panels, depth, panel], then the rest."""
    depth, columns = block.shape
    whole = columns - columns % panel
    yield block[:, :whole].reshape(depth, -1, panel).transpose(1, 0, 2)
    if whole < columns:
        yield block[:, whole:]
