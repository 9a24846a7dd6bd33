"""How much room things take in an arena. Plain numbers: who only asks loads no library."""

from __future__ import annotations

ALIGNMENT = 16  # elements: every matrix starts at a multiple of it
MAP_BYTES = 4


def aligned(numel: int) -> int:
    """The least multiple of ALIGNMENT that is not below it."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def map_numel(in_features: int, element_bytes: int) -> int:
    """Elements of an arena that an embedding's map takes: int32 [in], which row stands in the place of each token's."""
    return aligned(in_features * MAP_BYTES // element_bytes)
